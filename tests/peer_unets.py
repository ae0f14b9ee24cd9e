"""Networks with every condition, and peers of diffusers: their weights in the order of ours, and random weights."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
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


def peer_unet(
    resolution: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    head_dim: int,
    resample_in_blocks: bool = True,
    **changes: Any,
) -> UNet2DModel:
    """diffusers' U-Net of the sizes that ours takes; time by adaptive group norm."""
    attends = [resolution >> level in attention_resolutions for level in range(len(channel_mult))]
    plain = ("ResnetDownsample", "ResnetUpsample") if resample_in_blocks else ("Down", "Up")
    about = dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if resample_in_blocks else "conv")
    about |= {"layers_per_block": num_res_blocks, "attention_head_dim": head_dim, "sample_size": resolution}
    about |= {"block_out_channels": tuple(model_channels * mult for mult in channel_mult)}
    about |= {"down_block_types": tuple(f"{'AttnDown' if there else plain[0]}Block2D" for there in attends)}
    about |= {"up_block_types": tuple(f"{'AttnUp' if there else plain[1]}Block2D" for there in reversed(attends))}
    return UNet2DModel(**{"resnet_time_scale_shift": "scale_shift", **about, **changes})


def peer_autoencoder(*widths: int, **changes: Any) -> Any:
    """diffusers' autoencoder of 16² with so many channels at each level; of codes its VQModel."""
    blocks = {f"{side}_block_types": (f"{side.title()}{part}coderBlock2D",) * len(widths) for side, part in SIDES}
    about = {"block_out_channels": widths, "norm_num_groups": 4, "sample_size": 16, **blocks}
    return randomized((VQModel if "num_vq_embeddings" in changes else AutoencoderKL)(**about | changes))


SIDES = (("down", "En"), ("up", "De"))


def layers_of(peer: nn.Module) -> list[nn.Module]:
    """Every layer of the peer in the order in which ours are run."""
    layers = []
    for block in [*getattr(peer, "down_blocks", []), peer.mid_block, *getattr(peer, "up_blocks", [])]:
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
    names = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
    parts = [part for name in names if (part := getattr(layer, name, None)) is not None]
    return [tensor for part in parts for tensor in part.parameters()]


def weights_of_transformer_block(block: nn.Module) -> list[Tensor]:
    weights = []
    for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        kv = torch.cat([attention.to_k.weight, attention.to_v.weight])
        weights += [*norm.parameters(), attention.to_q.weight, kv, *attention.to_out[0].parameters()]
    return [*weights, *block.norm3.parameters(), *block.ff.parameters()]


def copy_layers(network: nn.Module, peer: nn.Module, levels: Iterable[Iterable[nn.Module]], **more: nn.Module) -> None:
    """Give layers, in the order in which they run, and the ends of `network` the weights of `peer`.

    Raises ValueError where one has a layer that the other lacks. `more`: the peer's, by their names in `network`.
    """
    ours, theirs = [layer for level in levels for layer in level], layers_of(peer)
    pairs = [(layer, weights_of(other)) for layer, other in zip(ours, theirs, strict=True)]
    ends = {"conv_in": peer.conv_in, "norm_out": peer.conv_norm_out, "conv_out": peer.conv_out, **more}
    pairs += [(getattr(network, name), list(other.parameters())) for name, other in ends.items()]
    with torch.no_grad():
        for mine, tensors in pairs:
            for parameter, tensor in zip(mine.parameters(), tensors, strict=True):
                parameter.copy_(tensor.reshape(parameter.shape))


def copy_weights(network: UNet, peer: nn.Module) -> None:
    """Give `network` the weights of `peer`."""
    more = {"time_mlp": peer.time_embedding}
    more |= {} if network.class_embedding is None else {"class_embedding": peer.class_embedding}
    copy_layers(network, peer, [*network.down, network.middle, *network.up], **more)
