"""The published networks have their published number of parameters (trainable; buffers do not count).

Tables of priors differ from ours (classes in a table of their own, no bias at the head): the counts agree to the digits
that their papers round to.
"""

import pytest
import torch
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.models.autoencoder import Autoencoder
from components.models.bundle import NETWORKS
from components.models.noisy_classifier import NoisyClassifier
from components.models.transformer import Transformer
from components.training.learner import make_network, without_memory
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_CLASSIFIERS, PAPER_DIFFUSION
from pipelines.recipes.shapes import TokenBranchRecipe

DATASET_INFO = DatasetInfo(num_classes=1000, vocab_size=50_257, text_length=128)
PUBLISHED = {
    "ddpm_cifar_10": 35_746_307,
    "iddpm_imagenet_64": 121_063_942,
    "adm_imagenet_64": 295_904_454,
    "adm_imagenet_128": 421_529_606,
    "adm_imagenet_256": 553_838_086,
    "adm_imagenet_256_unconditional": 552_814_086,
    "adm_imagenet_512": 558_997_638,
    "adm_upsampler_64_256": 311_795_910,
    "adm_upsampler_128_512": 308_835_270,
    "glide_base": 385_030_726,
    "glide_upsampler": 398_361_286,
    "ldm_ffhq_f4": 274_056_163,
    "ldm_imagenet_f8": 394_984_196,
    "ldm_imagenet_f4": 400_920_579,
    "ldm_text_to_image": 872_300_484,
}
WITHOUT_A_COUNT = {"cdm_upsampler_64_256", "palette"}


def build(config: DiffusionTraining) -> nn.Module:
    with torch.device("meta"):
        return NETWORKS[config.network.kind](**config.network_arguments(DATASET_INFO))


def count(module: nn.Module) -> int:
    """The codebook of "vq" is a parameter, as it was published, and counts."""
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PAPER_DIFFUSION)
def test_a_published_network_has_its_published_size(name: str):
    network = build(PAPER_DIFFUSION[name])
    size = count(network)
    if network.class_is_token:  # LDM counts its U-Net alone; the table of class tokens stands outside it
        size -= count(network.class_embedding)
    if name in WITHOUT_A_COUNT:
        assert size > 300e6
    else:
        assert size == PUBLISHED[name]


def test_every_published_network_is_in_the_list():
    assert PAPER_DIFFUSION.keys() == PUBLISHED.keys() | WITHOUT_A_COUNT


@pytest.mark.parametrize(
    ("name", "published"), zip(PAPER_CLASSIFIERS, (65_438_568, 42_568_040, 54_096_360, 54_448_360), strict=True)
)
def test_a_published_classifier_has_its_published_size(name: str, published: int):
    with torch.device("meta"):
        assert count(NoisyClassifier(**PAPER_CLASSIFIERS[name].network_arguments(DATASET_INFO))) == published


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_published_classifier_knows_the_noise_of_the_guided_model(name: str):
    recipe = PAPER_RECIPES[name]()
    if isinstance(recipe, DiffusionBranchRecipe) and recipe.classifier is not None:
        classifier, base = recipe.classifier, recipe.base
        assert classifier.data.resolution == base.data.resolution
        process = classifier.process.objective()
        del process["prediction_type"]  # which says nothing of the noise
        assert process.items() <= base.process.objective().items()


def test_palette_is_the_unconditional_network_of_adm_with_a_image_and_without_a_variance():
    adm = build(PAPER_DIFFUSION["adm_imagenet_256_unconditional"])
    more = 4 * 256 * 9  # four more channels go in: an image and its mask
    fewer = 3 * 256 * 9 + 3  # and three fewer come out
    assert count(build(PAPER_DIFFUSION["palette"])) == count(adm) + more - fewer


def build_autoencoder(name: str) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(**AUTOENCODERS[name].training.network_arguments())


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
    network = build_autoencoder(name)
    assert count(network) == published
    assert network.latent_shape == latent_shape


def test_encoder_and_decoder_of_vqgan_have_their_published_sizes():
    network = build_autoencoder("vqgan_imagenet_f16_1024")
    assert [count(network.encoder), count(network.decoder)] == [29_298_176, 42_449_795]


def test_the_dvae_makes_the_tokens_of_dalle():
    """Its network is ours: DALL-E's own encoder and decoder have another architecture."""
    network = build_autoencoder("dalle_dvae_f8_8192")
    assert network.codebook_size == 8192
    assert network.grid == (32, 32)
    assert network.last_layer.shape[0] == 6  # mu and log b of the logit-Laplace


def test_the_vq_vae_makes_the_tokens_of_its_paper():
    """128² images, 32² latents, 512 codes."""
    network = build_autoencoder("vqvae_imagenet_128")
    assert (network.grid, network.codebook_size) == ((32, 32), 512)


def build_prior(name: str, *, classes: int) -> Transformer:
    recipe = PAPER_RECIPES[name]()
    assert isinstance(recipe, TokenBranchRecipe)
    text = recipe.images
    dataset_info = DatasetInfo(num_classes=classes, vocab_size=text.vocab_size, text_length=text.text_length)
    with without_memory():
        return make_network(recipe.prior, dataset_info, recipe.tokenizer.token_grid)


@pytest.mark.parametrize(
    ("name", "billions", "digits", "classes"),
    [("imagenet_class_prior", 1.4, 1, 1000), ("mindalle_text_prior", 1.3, 1, 1), ("dalle_text_prior", 12, 0, 1)],
)
def test_a_published_prior_has_its_published_size(name: str, billions: float, digits: int, classes: int):
    assert round(count(build_prior(name, classes=classes)) / 1e9, digits) == billions


def test_dalle_s_prior_has_the_sequence_and_the_heads_of_its_paper():
    """64 layers of 62 heads of 64; 256 text tokens of 16,384 words, then 32² of 8,192 codes."""
    network = build_prior("dalle_text_prior", classes=1)
    assert (len(network.blocks), network.num_heads, network.head.in_features // network.num_heads) == (64, 62, 64)
    assert (network.text_length, network.text_embedding.num_embeddings) == (256, 16_384)
    assert (network.grid, network.codebook_size) == ((32, 32), 8192)
    matrices = sum(parameter.numel() for parameter in network.blocks.parameters() if parameter.ndim == 2)
    assert matrices == 64 * 12 * 3968**2
