"""Networks with every condition, and U-Nets of diffusers: their weights in the order of ours, and random weights."""

import torch
from torch import Tensor, nn

from components.models.dit import DiT
from components.models.unet import UNet

SMALL_UNET = {"resolution": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
SMALL_UNET |= {"attention_resolutions": (4,), "head_dim": 8}
SMALL_DIT = {"resolution": 8, "patch_size": 2, "model_dim": 16, "num_layers": 2, "num_heads": 2}


def full_network(kind: str = "unet", **changes) -> UNet | DiT:
    """A small network with every condition."""
    text = {"vocab_size": 20, "context_length": 8, "model_dim": 16, "num_layers": 1, "num_heads": 2}
    everything = {"num_classes": 5, "text": text, "low_res": True}
    everything |= {"condition_image_channels": 1, "image_embedding_dim": 6} | changes
    return UNet(**(SMALL_UNET | everything)) if kind == "unet" else DiT(**(SMALL_DIT | everything))


def inputs(batch: int = 3) -> dict[str, Tensor]:
    """What it takes."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(batch, 3, 8, 8, generator=generator),
        "time": torch.randint(1000, (batch,), generator=generator),
        "label": torch.randint(5, (batch,), generator=generator),
        "text": torch.cat([torch.randint(4, 20, (batch, 5), generator=generator), torch.zeros(batch, 2).long()], 1),
        "low_res": torch.randn(batch, 3, 8, 8, generator=generator),
        "noise_level": torch.randint(1, 100, (batch,), generator=generator),
        "condition_image": torch.randn(batch, 1, 8, 8, generator=generator),
        "image_embedding": torch.randn(batch, 6, generator=generator),
    }


def randomized(network: nn.Module) -> nn.Module:
    """Zero-initialized layers hide everything behind them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(network.named_parameters()):
        with torch.no_grad():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (name.endswith("norm") * 1.0))
    return network.eval()


def layers_of(peer: nn.Module) -> list[nn.Module]:
    """Every layer of the peer in the order in which ours are run."""
    layers = []
    for block in [*peer.down_blocks, peer.mid_block, *peer.up_blocks]:
        attentions = list(getattr(block, "attentions", []))
        for i, resnet in enumerate(block.resnets):
            layers += [resnet, *attentions[i : i + 1]]
        layers += [*(getattr(block, "downsamplers", None) or []), *(getattr(block, "upsamplers", None) or [])]
    return layers


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Weights of a peer's layer in the order of ours."""
    if hasattr(layer, "transformer_blocks"):
        blocks = [tensor for block in layer.transformer_blocks for tensor in weights_of_transformer_block(block)]
        return [*layer.norm.parameters(), *layer.proj_in.parameters(), *blocks, *layer.proj_out.parameters()]
    if hasattr(layer, "to_q"):
        qkv = [
            torch.cat([getattr(layer.get_submodule(name), part) for name in ("to_q", "to_k", "to_v")])
            for part in ("weight", "bias")
        ]
        return [layer.group_norm.weight, layer.group_norm.bias, *qkv, *layer.to_out[0].parameters()]
    if not hasattr(layer, "conv1"):
        return list(layer.parameters())
    parts = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"]
    return [
        tensor
        for part in parts
        if getattr(layer, part, None) is not None
        for tensor in getattr(layer, part).parameters()
    ]


def weights_of_transformer_block(block: nn.Module) -> list[Tensor]:
    weights = []
    for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        kv = torch.cat([attention.to_k.weight, attention.to_v.weight])
        weights += [*norm.parameters(), attention.to_q.weight, kv, *attention.to_out[0].parameters()]
    return [*weights, *block.norm3.parameters(), *block.ff.parameters()]


def copy_weights(network: UNet, peer: nn.Module) -> None:
    """Give `network` the weights of `peer`, and raise ValueError where one has a layer that the other lacks."""
    ours = [layer for layers in [*network.down, network.middle, *network.up] for layer in layers]
    pairs = [(layer.parameters(), weights_of(other)) for layer, other in zip(ours, layers_of(peer), strict=True)]
    ends = [
        (network.time_mlp, peer.time_embedding),
        (network.conv_in, peer.conv_in),
        (network.norm_out, peer.conv_norm_out),
        (network.conv_out, peer.conv_out),
    ]
    if network.class_embedding is not None:
        ends.append((network.class_embedding, peer.class_embedding))
    pairs += [(mine.parameters(), list(theirs.parameters())) for mine, theirs in ends]
    with torch.no_grad():
        for mine, theirs in pairs:
            for parameter, tensor in zip(mine, theirs, strict=True):
                parameter.copy_(tensor.reshape(parameter.shape))
