"""Laws of the U-Net: published sizes, equality with diffusers, and what each condition may and may not do."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from components.models.unet import ResBlock, UNet

SMALL = {
    "resolution": 8,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_dim": 8,
}


def randomized(network: nn.Module) -> nn.Module:
    """Zero-initialized layers hide everything behind them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(network.named_parameters()):
        with torch.no_grad():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (name.endswith("norm") * 1.0))
    return network.eval()


def num_parameters(**settings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(**settings).parameters())


ADM_64 = {
    "resolution": 64,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "attention_resolutions": (32, 16, 8),
    "head_dim": 64,
    "out_channels": 6,
    "dropout": 0.1,
}
ADM_UPSAMPLER = {
    "resolution": 256,
    "model_channels": 192,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (32, 16, 8),
    "num_heads": 4,
    "out_channels": 6,
}


def test_the_cifar_10_network_of_ddpm_has_its_published_size():
    settings = {"resolution": 32, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2}
    old_style = {"num_heads": 1, "scale_shift_norm": False, "resample_in_blocks": False}
    assert num_parameters(**settings, attention_resolutions=(16,), **old_style) == 35_746_307


def test_the_imagenet_64_network_of_iddpm_has_its_published_size():
    settings = {"resolution": 64, "model_channels": 128, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}
    settings |= {"attention_resolutions": (16, 8), "num_heads": 4, "resample_in_blocks": False, "out_channels": 6}
    assert num_parameters(**settings) == 121_063_942


def test_the_imagenet_networks_of_adm_have_their_published_sizes_and_one_null_label():
    null_row = 4 * 192
    assert num_parameters(**ADM_64, num_classes=1000) == 295_904_454 + null_row
    assert num_parameters(**ADM_UPSAMPLER, in_channels=6, num_classes=1000) == 311_795_910 + null_row


def test_our_upsampler_is_that_of_adm_and_an_embedding_of_the_noise_level():
    mlp = 192 * 768 + 768 + 768 * 768 + 768
    ours = num_parameters(**ADM_UPSAMPLER, low_res=True, num_classes=1000)
    assert ours == num_parameters(**ADM_UPSAMPLER, in_channels=6, num_classes=1000) + mlp


def peer_of(settings: dict, *, scale_shift_norm: bool, resample_in_blocks: bool) -> UNet2DModel:
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resample_in_blocks else ("DownBlock2D", "UpBlock2D")
    resampling = "resnet" if resample_in_blocks else "conv"
    return UNet2DModel(
        sample_size=settings["resolution"],
        layers_per_block=settings["num_res_blocks"],
        block_out_channels=tuple(mult * settings["model_channels"] for mult in settings["channel_mult"]),
        down_block_types=(plain[0], "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=(plain[1], "AttnUpBlock2D", "UpBlock2D"),
        downsample_type=resampling,
        upsample_type=resampling,
        resnet_time_scale_shift="scale_shift" if scale_shift_norm else "default",
        attention_head_dim=settings["head_dim"],
        attn_norm_num_groups=32,
        num_class_embeds=settings["num_classes"] + 1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def layers_of(peer: UNet2DModel) -> list[nn.Module]:
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


def copy_weights(network: UNet, peer: UNet2DModel) -> None:
    ours = [layer for layers in [*network.down, network.middle, *network.up] for layer in layers]
    pairs = [(layer.parameters(), weights_of(other)) for layer, other in zip(ours, layers_of(peer), strict=True)]
    for mine, theirs in [
        (network.time_mlp, peer.time_embedding),
        (network.class_embedding, peer.class_embedding),
        (network.conv_in, peer.conv_in),
        (network.norm_out, peer.conv_norm_out),
        (network.conv_out, peer.conv_out),
    ]:
        pairs.append((mine.parameters(), list(theirs.parameters())))
    with torch.no_grad():
        for mine, theirs in pairs:
            for parameter, tensor in zip(mine, theirs, strict=True):
                parameter.copy_(tensor.reshape(parameter.shape))


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@pytest.mark.parametrize("resample_in_blocks", [True, False])
def test_the_network_equals_that_of_diffusers_under_a_map_of_weights(scale_shift_norm, resample_in_blocks):
    settings = {"resolution": 8, "model_channels": 128, "channel_mult": (1, 1, 2), "num_res_blocks": 1}
    settings |= {"attention_resolutions": (4,), "head_dim": 64, "num_classes": 9}
    style = {"scale_shift_norm": scale_shift_norm, "resample_in_blocks": resample_in_blocks}
    network = UNet(**settings, **style).eval()
    peer = randomized(peer_of(settings, **style))
    copy_weights(network, peer)
    x_t, timesteps, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 977]), torch.tensor([0, 9])
    with torch.no_grad():
        ours, theirs = network(x_t, timesteps, label=label), peer(x_t, timesteps, class_labels=label).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def inputs(batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(batch, 3, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (batch,), generator=generator),
        "label": torch.randint(5, (batch,), generator=generator),
        "text": torch.cat([torch.randint(4, 20, (batch, 5), generator=generator), torch.zeros(batch, 2).long()], 1),
        "low_res": torch.randn(batch, 3, 8, 8, generator=generator),
        "noise_level": torch.randint(1, 100, (batch,), generator=generator),
    }


def full_network(**changes) -> UNet:
    text = {"vocab_size": 20, "context_length": 8, "model_dim": 16, "num_layers": 1, "num_heads": 2}
    return UNet(**(SMALL | {"num_classes": 5, "text": text, "low_res": True} | changes))


def test_a_new_network_predicts_nothing_and_its_blocks_pass_their_input_on():
    network = full_network()
    assert network(**inputs()).abs().max() == 0
    block = ResBlock(16, 16, embedding_dim=64, dropout=0.0, scale_shift_norm=True)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 64)), x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timesteps", torch.tensor([0, 0, 0])),
        ("label", torch.tensor([5, 5, 5])),
        ("text", torch.tensor([[1, 2, 0, 0, 0, 0, 0]] * 3)),
        ("low_res", torch.zeros(3, 3, 8, 8)),
        ("noise_level", torch.tensor([0, 0, 0])),
    ],
)
def test_every_condition_reaches_the_prediction(name, value):
    network = randomized(full_network())
    with torch.no_grad():
        change = network(**inputs()) - network(**(inputs() | {name: value}))
    assert (change.abs().amax((1, 2, 3)) > 1e-3).all()


def test_the_noise_level_has_an_embedding_of_its_own():
    """Exchanging timestep and noise level is not the same question."""
    network, known = randomized(full_network()), inputs()
    exchanged = known | {"timesteps": known["noise_level"], "noise_level": known["timesteps"]}
    with torch.no_grad():
        assert (network(**known) - network(**exchanged)).abs().max() > 1e-3


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch():
    network, known = randomized(full_network()), inputs()
    with torch.no_grad():
        together = network(**known)
        for i in range(3):
            alone = network(**{name: value[i : i + 1] for name, value in known.items()})
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_memory_format_of_the_input_does_not_change_the_prediction():
    network, known = randomized(full_network()), inputs()
    with torch.no_grad():
        other = known | {"x_t": known["x_t"].to(memory_format=torch.channels_last)}
        torch.testing.assert_close(network(**known), network(**other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", [{}, {"scale_shift_norm": False, "resample_in_blocks": False}])
def test_training_under_bf16_autocast_reaches_every_weight_and_stays_near_fp32(style):
    """ADM's own checkpointed attention fails in the backward of this."""
    network, known = randomized(full_network(**style)).train(), inputs()
    exact = network(**known).square().mean()
    wanted = torch.autograd.grad(exact, list(network.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(**known)
    assert prediction.dtype == torch.float32
    loss = prediction.square().mean()
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    similarity = torch.cosine_similarity(
        torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in wanted]), dim=0
    )
    assert similarity > 0.99


def test_a_condition_that_is_missing_or_unknown_is_refused():
    known = inputs()
    with pytest.raises(ValueError, match="is conditioned on noise_level"):
        full_network()(**{name: value for name, value in known.items() if name != "noise_level"})
    with pytest.raises(ValueError, match="is not conditioned on text"):
        full_network(text=None)(**known)


@pytest.mark.parametrize("change", [{"resolution": 9}, {"head_dim": None}, {"num_heads": 2}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"halved|either head_dim or num_heads"):
        UNet(**(SMALL | change))
