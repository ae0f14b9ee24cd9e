"""Laws of the autoencoder's networks; the oracles are diffusers' VQModel and AutoencoderKL."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from components.models.autoencoder import Autoencoder, Downsample, ResBlock, Upsample
from components.models.layers import SelfAttention2d


def make_autoencoder(**changes: object) -> Autoencoder:
    settings = {
        "resolution": 16,
        "channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "latent_channels": 8,
        "bottleneck": {"kind": "vq_ema", "codebook_size": 32, "codebook_dim": 4},
    }
    return Autoencoder(**(settings | changes)).eval()


def copy_pair(ours: nn.Module, peer: nn.Module) -> None:
    peer.load_state_dict(ours.state_dict())


def copy_res_block(ours: ResBlock, peer: nn.Module) -> None:
    names = {"norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2", "conv_2": "conv2"}
    for name, peer_name in names.items():
        copy_pair(getattr(ours, name), getattr(peer, peer_name))
    if isinstance(ours.skip, nn.Conv2d):
        copy_pair(ours.skip, peer.conv_shortcut)


def copy_attention(ours: SelfAttention2d, peer: nn.Module) -> None:
    copy_pair(ours.norm, peer.group_norm)
    peer.to_out[0].weight.data.copy_(ours.proj.weight.flatten(1))
    peer.to_out[0].bias.data.copy_(ours.proj.bias)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        getattr(peer, name).weight.data.copy_(ours.qkv.weight.chunk(3)[i].flatten(1))
        getattr(peer, name).bias.data.copy_(ours.qkv.bias.chunk(3)[i])


def copy_blocks(ours: nn.Sequential, peer: nn.Module, *, sampler: str) -> None:
    """Residual blocks, attention and resampling of one level, each kind in its order."""
    for kind, copy, peers in (
        (ResBlock, copy_res_block, peer.resnets),
        (SelfAttention2d, copy_attention, getattr(peer, "attentions", [])),
    ):
        for block, peer_block in zip([m for m in ours if isinstance(m, kind)], peers, strict=True):
            copy(block, peer_block)
    for block in ours:
        if isinstance(block, Downsample | Upsample):
            copy_pair(block.conv, getattr(peer, sampler)[0].conv)


def copy_to_peer(ours: Autoencoder, peer: VQModel | AutoencoderKL) -> None:
    for side, peer_side, levels, sampler in (
        (ours.encoder, peer.encoder, peer.encoder.down_blocks, "downsamplers"),
        (ours.decoder, peer.decoder, peer.decoder.up_blocks, "upsamplers"),
    ):
        copy_pair(side.conv_in, peer_side.conv_in)
        for level, peer_level in zip(side.levels, levels, strict=True):
            copy_blocks(level, peer_level, sampler=sampler)
        copy_blocks(side.middle, peer_side.mid_block, sampler=sampler)
        copy_pair(side.norm_out, peer_side.conv_norm_out)
        copy_pair(side.conv_out, peer_side.conv_out)


def randomize(module: nn.Module) -> None:
    """All weights and biases, also those of the norms: a zero or a one hides what it multiplies."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.normal_(generator=generator).mul_(scale)


@pytest.fixture(scope="module")
def pair() -> tuple[Autoencoder, VQModel]:
    ours = make_autoencoder(channels=128, bottleneck={"kind": "vq_ema", "codebook_size": 32, "codebook_dim": 8})
    peer = VQModel(
        block_out_channels=(128, 256),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
    ).eval()
    randomize(ours)
    ours.encoder.conv_in.bias.data.zero_()  # so that a faint image stays faint up to the first norm
    copy_to_peer(ours, peer)
    return ours, peer


@torch.no_grad()
@pytest.mark.parametrize("contrast", [1.0, 1e-3])
def test_encoder_equals_the_oracle_under_random_weights(pair: tuple[Autoencoder, VQModel], contrast: float):
    """Also for a faint image, where the epsilon of the norms shows."""
    ours, peer = pair
    image = (torch.rand(2, 3, 16, 16) * 2 - 1) * contrast
    torch.testing.assert_close(ours.encoder(image), peer.encoder(image), atol=1.6e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_decoder_equals_the_oracle_under_random_weights(
    pair: tuple[Autoencoder, VQModel], memory_format: torch.memory_format
):
    ours, peer = pair
    z_q = torch.randn(2, 8, 8, 8)
    out = ours.to(memory_format=memory_format).decoder(z_q.contiguous(memory_format=memory_format))
    torch.testing.assert_close(out, peer.decoder(z_q), atol=6.7e-5, rtol=0)


@torch.no_grad()
def test_a_gaussian_autoencoder_equals_the_oracle_in_moments_divergence_and_image():
    ours = make_autoencoder(channels=128, attention_resolutions=(), latent_channels=4, bottleneck={"kind": "gaussian"})
    peer = AutoencoderKL(
        block_out_channels=(128, 256),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    randomize(ours)
    copy_to_peer(ours, peer)
    copy_pair(ours.project_in, peer.quant_conv)
    copy_pair(ours.project_out, peer.post_quant_conv)
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    expected = peer.encode(image).latent_dist
    encoded = ours.encode(image, noise=noise)
    torch.testing.assert_close(ours.encode(image).z, expected.mean, atol=1.6e-5, rtol=0)
    torch.testing.assert_close(encoded.z, expected.mean + expected.std * noise, atol=3.2e-5, rtol=0)
    torch.testing.assert_close(encoded.losses["kl_loss"], expected.kl().mean())
    torch.testing.assert_close(ours.decode(encoded.z), peer.decode(encoded.z).sample, atol=6.7e-5, rtol=0)


def test_detokenize_of_tokenize_is_the_reconstruction():
    autoencoder = make_autoencoder()
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        reconstruction, encoded = autoencoder(image)
    indices = autoencoder.tokenize(image)
    assert indices.shape == (3, *autoencoder.grid)
    assert torch.equal(indices, encoded.indices)
    torch.testing.assert_close(autoencoder.detokenize(indices), reconstruction, atol=1e-6, rtol=0)


@torch.no_grad()
def test_with_a_patch_shortcut_encoder_and_decoder_start_as_linear_maps():
    """Of each patch alone there, and to a color that is blended between positions back."""
    autoencoder = make_autoencoder(patch_shortcut=True)
    first, second = torch.randn(2, 1, 3, 16, 16)
    encode, decode = autoencoder.encoder, autoencoder.decoder
    features = encode(first)
    torch.testing.assert_close(encode(first - 2 * second), features - 2 * encode(second))
    torch.testing.assert_close(decode(3 * features), 3 * decode(features))
    second[:, :, 2:4, 6:8] = first[:, :, 2:4, 6:8]
    torch.testing.assert_close(encode(second)[:, :, 1, 3], features[:, :, 1, 3])
    color = decode(features[:, :, 1:2, 3:4].expand(1, -1, 8, 8))
    torch.testing.assert_close(color, color[:, :, :1, :1].expand(1, 3, 16, 16))


@pytest.mark.parametrize("patch_shortcut", [False, True])
def test_every_parameter_takes_part_in_training(patch_shortcut: bool):
    autoencoder = make_autoencoder(patch_shortcut=patch_shortcut).train()
    randomize(autoencoder)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, encoded = autoencoder(image)
    ((reconstruction - image).square().mean() + encoded.losses["commitment_loss"]).backward()
    still = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_the_last_layer_is_the_weight_that_makes_the_pixels():
    autoencoder = make_autoencoder()
    autoencoder.last_layer.data.zero_()
    image = torch.rand(1, 3, 16, 16)
    bias: Tensor = autoencoder.decoder.conv_out.bias
    torch.testing.assert_close(autoencoder(image)[0], bias[None, :, None, None].expand(1, 3, 16, 16))


def test_autocast_changes_the_reconstruction_by_rounding_only():
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    indices = torch.randint(0, 32, (2, 8, 8))
    exact = autoencoder.detokenize(indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = autoencoder.detokenize(indices)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_bottleneck_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="unknown bottleneck 'lfq'"):
        make_autoencoder(bottleneck={"kind": "lfq"})


def test_a_resolution_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        make_autoencoder(resolution=15)
