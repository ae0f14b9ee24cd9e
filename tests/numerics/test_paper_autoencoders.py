"""The published autoencoders have their published number of parameters (trainable; buffers do not count)."""

import pytest
import torch
from torch import nn

from components.models.autoencoder import Autoencoder
from pipelines.recipes.published_networks import AUTOENCODERS


def build(name: str) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(**AUTOENCODERS[name].training.network_arguments())


def count(module: nn.Module) -> int:
    """The codebook of "vq" is a parameter, as it was published, and counts."""
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "published", "latent_shape"),
    [
        ("vqgan_imagenet_f16_1024", 72_141_699, (256, 16, 16)),
        ("vqgan_imagenet_f16_16384", 76_073_859, (256, 16, 16)),
        ("ldm_kl_f4", 55_312_063, (3, 64, 64)),
        ("ldm_kl_f8", 83_653_863, (4, 32, 32)),
        ("ldm_kl_f16", 69_610_963, (16, 16, 16)),
        ("ldm_vq_f4", 55_322_782, (3, 64, 64)),
        ("ldm_vq_f8", 67_717_295, (4, 32, 32)),
        ("ldm_vq_f16", 69_593_371, (8, 16, 16)),
    ],
)
def test_a_published_autoencoder_has_its_published_size_and_latent(
    name: str, published: int, latent_shape: tuple[int, int, int]
):
    network = build(name)
    assert count(network) == published
    assert network.latent_shape == latent_shape


def test_encoder_and_decoder_of_vqgan_have_their_published_sizes():
    network = build("vqgan_imagenet_f16_1024")
    assert [count(network.encoder), count(network.decoder)] == [29_298_176, 42_449_795]


def test_the_dvae_makes_the_tokens_of_dalle():
    """Its network is ours: DALL-E's own encoder and decoder have another architecture."""
    network = build("dalle_dvae_f8_8192")
    assert network.codebook_size == 8192
    assert network.grid == (32, 32)
    assert network.last_layer.shape[0] == 6  # mu and log b of the logit-Laplace


def test_the_vq_vae_makes_the_tokens_of_its_paper():
    """128² images, 32² latents, 512 codes."""
    network = build("vqvae_imagenet_128")
    assert (network.grid, network.codebook_size) == ((32, 32), 512)
