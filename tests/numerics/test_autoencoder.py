"""Laws of the autoencoder's networks; the oracles are diffusers' VQModel and AutoencoderKL."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from components.data.images import load_mask
from components.models.autoencoder import Autoencoder
from components.models.losses.reconstruction import image_of
from components.sampling.image_files import encode_png
from components.sampling.images import to_uint8
from tests.benchmarks.bench_vqgan import peer_model
from tests.peer_unets import copy_layers, randomized
from tests.token_models import unmoved


def make_autoencoder(**changes: object) -> Autoencoder:
    settings = {"resolution": 16, "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 8}
    settings |= {
        "attention_resolutions": (8,),
        "bottleneck": {"kind": "vq_ema", "codebook_size": 32, "codebook_dim": 4},
    }
    return Autoencoder(**(settings | changes)).eval()


def take_weights(ours: Autoencoder, peer: VQModel | AutoencoderKL) -> None:
    randomized(peer).encoder.conv_in.bias.data.zero_()  # so that a faint image stays faint up to the first norm
    copy_layers(ours.encoder, peer.encoder, [*ours.encoder.levels, ours.encoder.middle])
    copy_layers(ours.decoder, peer.decoder, [ours.decoder.middle, *ours.decoder.levels])


@pytest.fixture(scope="module")
def pair() -> tuple[Autoencoder, VQModel]:
    ours = make_autoencoder(channels=128, bottleneck={"kind": "vq_ema", "codebook_size": 32, "codebook_dim": 8})
    peer = peer_model(128, (1, 2), layers_per_block=1, latent_channels=8, num_vq_embeddings=32)
    take_weights(ours, peer)
    return ours, peer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["logit_laplace", "discretized_logistic"])
def test_a_shared_scale_is_one_for_all_values_of_an_image_and_leaves_the_image_as_it_is(kind: str) -> None:
    own, z = make_autoencoder(reconstruction=kind), torch.randn(3, 4, 8, 8)
    shared = make_autoencoder(reconstruction=kind, shared_scale=True)
    shared.load_state_dict(own.state_dict())
    log_scale = shared.decode_raw(z)[:, 3:]
    assert torch.equal(shared.decode(z), own.decode(z))
    assert [len(each.unique()) for each in (log_scale, *log_scale)] == [3, 1, 1, 1]
    torch.testing.assert_close(log_scale[:, 0, 0, 0], own.decode_raw(z)[:, 3:].mean(dim=(1, 2, 3)))


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
    )
    take_weights(ours, peer)
    ours.project_in.load_state_dict(peer.quant_conv.state_dict())
    ours.project_out.load_state_dict(peer.post_quant_conv.state_dict())
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
    autoencoder = randomized(make_autoencoder(patch_shortcut=patch_shortcut)).train()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, encoded = autoencoder(image)
    ((reconstruction - image).square().mean() + encoded.losses["commitment_loss"]).backward()
    assert unmoved(autoencoder) == []


def test_the_last_layer_is_the_weight_that_makes_the_pixels():
    autoencoder = make_autoencoder()
    autoencoder.last_layer.data.zero_()
    image = torch.rand(1, 3, 16, 16)
    bias: Tensor = autoencoder.decoder.conv_out.bias
    torch.testing.assert_close(autoencoder(image)[0], bias[None, :, None, None].expand(1, 3, 16, 16))


def test_autocast_changes_the_reconstruction_by_rounding_only():
    autoencoder = make_autoencoder()
    indices = torch.randint(0, 32, (2, 8, 8))
    exact = autoencoder.detokenize(indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = autoencoder.detokenize(indices)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bottleneck": {"kind": "lfq"}}, "unknown bottleneck 'lfq'"), ({"resolution": 15}, "not a multiple")],
)
def test_an_unknown_bottleneck_and_a_resolution_that_cannot_be_halved_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_autoencoder(**change)


def test_an_autoencoder_of_gray_images_sees_colors_as_their_gray() -> None:
    network, image = make_autoencoder(image_channels=1), torch.rand(2, 3, 16, 16) * 2 - 1
    assert network.reconstruct(image).shape == (2, 1, 16, 16)
    luma = (image * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    rounded = ((luma + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(network.tokenize(image), network.tokenize(rounded))


@pytest.mark.parametrize("classes", [4, 182, 256])
def test_a_map_of_classes_is_read_as_a_plane_for_each_whatever_their_number(classes: int) -> None:
    values = torch.arange(classes)
    gray = (values * 255 / (classes - 1)).round() / 127.5 - 1  # of 8 bits, as masks of a set are stored
    planes = make_autoencoder(image_channels=classes).planes(gray.expand(1, 3, 1, -1))
    assert torch.equal(planes[0, :, 0], torch.eye(classes))


def test_a_class_comes_back_as_the_gray_that_its_mask_has_in_a_set_whatever_their_number() -> None:
    for classes in range(2, 257):
        values = np.arange(classes, dtype=np.uint8)
        stored = load_mask(encode_png(np.resize(values, (classes, classes))), resolution=classes, mask_values=classes)
        planes = torch.eye(classes).view(1, classes, 1, classes)
        np.testing.assert_array_equal(to_uint8(image_of(planes, kind="classes"))[0, 0], stored[0])


def test_without_projections_the_bottleneck_has_the_channels_of_the_encoder() -> None:
    gaussian = make_autoencoder(projections=False, bottleneck={"kind": "gaussian"}, latent_shift=0.5)
    image = torch.randn(1, 3, 16, 16)
    assert not {*gaussian.project_in.parameters(), *gaussian.project_out.parameters()}
    torch.testing.assert_close(gaussian.from_latents(gaussian.to_latents(image)), gaussian.reconstruct(image))
    with pytest.raises(ValueError, match="latent_channels 8 without projections"):
        make_autoencoder(projections=False)
