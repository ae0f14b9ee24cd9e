"""Published networks have their published number of parameters (trainable; buffers do not count) and of groups in
every norm, which no count of parameters notices; networks of our own keep four channels in each group.

Tables of priors differ from ours (classes in a table of their own, no bias at the head): the counts agree to the digits
that their papers round to.
"""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.config import Config
from components.configuration.optimization import Training
from components.models.bundle import NETWORKS
from components.models.critics import PatchDiscriminator
from components.models.gan import ProjectionDiscriminator
from components.models.layers import GroupNorm
from components.models.transformer import Transformer
from components.training.learner import make_network, without_memory
from pipelines.recipes.catalog import RECIPES
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
    "stable_diffusion_v1": 859_520_964,
    "edm_imagenet_64": 295_899_267,
    "edm_cifar_10": 55_733_891 - 9 * 128,  # without the map of nine numbers of augmentation
    "dit_imagenet_256": 675_129_632 - 256 * 1152,  # without positions, which are no parameter here
    # The code of CDM and of Palette was not published: both networks are ADM's here. CDM's knows the noise of its
    # condition; into Palette's go an image and its mask too, and no variance comes out.
    "cdm_upsampler_64_256": 311_795_910 + (192 * 768 + 768) + (768 * 768 + 768),
    "palette": 552_814_086 + 4 * 256 * 9 - (3 * 256 * 9 + 3),
}
NEAR = {  # parameters here, and those of the paper, which states a digit or two and has no code
    "dalle_2_decoder": (3_556_513_286, 3.5e9),
    "dalle_2_upsampler_256": (731_761_286, 700e6),
    "dalle_2_upsampler_1024": (282_803_142, 300e6),
    "imagen_base": (2_254_089_731, 2e9),
    "imagen_upsampler_256": (614_637_571, 600e6),
    "imagen_upsampler_1024": (393_086_979, 400e6),
}
# Further than 5 %, but what the paper rounds to its digit. States of T5-XXL in every attention are a tenth of Imagen's
# base.
ROUNDED = ("dalle_2_upsampler_1024", "imagen_base")
LATENTS: dict[str, tuple[int, tuple[int, int, int]]] = {  # parameters and shape of what autoencoders make
    "vqgan_imagenet_f16_1024": (72_141_699, (256, 16, 16)),
    "vqgan_imagenet_f16_16384": (76_073_859, (256, 16, 16)),
    "vqgan_imagenet_depth_f16_1024": (72_137_089, (256, 16, 16)),
    "vqgan_coco_segmentation_f16_1024": (72_556_599, (256, 16, 16)),
    "ldm_kl_f4": (55_312_063, (3, 64, 64)),
    "ldm_kl_f8": (83_653_863, (4, 32, 32)),
    "ldm_kl_f16": (69_610_963, (16, 16, 16)),
    "ldm_vq_f4": (55_322_782, (3, 64, 64)),
    "ldm_vq_f8": (67_717_295, (4, 32, 32)),
    "ldm_vq_f16": (69_593_371, (8, 16, 16)),
}
# In all of them 32 groups, at every width: `normalization` of openai/improved-diffusion, guided-diffusion (nn.py),
# openai/glide-text2im (nn.py) and CompVis/latent-diffusion (diffusionmodules/util.py) makes `GroupNorm32` of 32 groups;
# `Normalize` of CompVis/latent-diffusion (diffusionmodules/model.py, as taming-transformers, and attention.py) too; the
# code of DDPM leaves `group_norm` of tf.contrib at its default, 32.
GROUPS = {32}


def build(config: Config) -> nn.Module:
    """A recipe's network as its bundle rebuilds it, without weights."""
    arguments = json.loads(json.dumps(config.network_arguments(DATASET_INFO)))
    with torch.device("meta"):
        return NETWORKS[config.network.kind](**arguments)


def count(module: nn.Module) -> int:
    """The codebook of "vq" is a parameter, as it was published, and counts."""
    return sum(parameter.numel() for parameter in module.parameters())


def norms_of(network: nn.Module) -> list[tuple[int, int]]:
    """(channels, groups) of each group norm."""
    return [(m.num_channels, m.num_groups) for m in network.modules() if isinstance(m, nn.GroupNorm)]


def groups_of(network: nn.Module) -> set[int]:
    return {groups for _, groups in norms_of(network)}


@pytest.mark.parametrize("name", PAPER_DIFFUSION)
def test_a_published_network_has_its_published_size(name: str):
    network = build(PAPER_DIFFUSION[name])
    # LDM counts its U-Net alone; the table of class tokens stands outside it.
    size = count(network) - (count(network.class_embedding) if network.class_is_token else 0)
    published = PUBLISHED | {name: own for name, (own, _) in NEAR.items()}
    assert (size, groups_of(network) or GROUPS) == (published[name], GROUPS)


@pytest.mark.parametrize("name", NEAR)
def test_a_network_without_public_code_is_within_five_percent_or_rounds_to_its_published_size(name: str):
    own, published = NEAR[name]
    assert (abs(own / published - 1) > 0.05) == (name in ROUNDED)
    assert name not in ROUNDED or float(f"{own:.0e}") == published


@pytest.mark.parametrize(
    ("name", "published"), zip(PAPER_CLASSIFIERS, (65_438_568, 42_568_040, 54_096_360, 54_448_360), strict=True)
)
def test_a_published_classifier_has_its_published_size(name: str, published: int):
    network = build(PAPER_CLASSIFIERS[name])
    assert (count(network), groups_of(network)) == (published, GROUPS)


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_published_classifier_knows_the_noise_of_the_guided_model(name: str):
    recipe = PAPER_RECIPES[name]()
    if isinstance(recipe, DiffusionBranchRecipe) and recipe.classifier is not None:
        classifier, base = recipe.classifier, recipe.base
        assert classifier.data.resolution == base.data.resolution
        process = classifier.process.objective()
        del process["prediction_type"]  # which says nothing of the noise
        assert process.items() <= base.process.objective().items()


@pytest.mark.parametrize("name", LATENTS)
def test_a_published_autoencoder_has_its_published_size_and_latent(name: str):
    network = build(AUTOENCODERS[name].training)
    assert (count(network), network.latent_shape) == LATENTS[name]
    assert groups_of(network) == GROUPS


def test_encoder_and_decoder_of_vqgan_have_their_published_sizes():
    network = build(AUTOENCODERS["vqgan_imagenet_f16_1024"].training)
    assert [count(network.encoder), count(network.decoder)] == [29_298_176, 42_449_795]


def test_the_vq_vae_makes_the_tokens_of_its_paper():
    """128² images, 32² latents, 512 codes; and the dVAE those of DALL-E, whose own network is another."""
    network, dvae = (build(AUTOENCODERS[name].training) for name in ("vqvae_imagenet_128", "dalle_dvae_f8_8192"))
    assert (network.grid, network.codebook_size) == ((32, 32), 512)
    assert (dvae.grid, dvae.codebook_size) == ((32, 32), 8192)
    assert dvae.last_layer.shape[0] == 6  # mu and log b of the logit-Laplace
    assert AUTOENCODERS.keys() == {*LATENTS, "vqvae_imagenet_128", "dalle_dvae_f8_8192"}


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


def test_biggan_has_its_published_size_but_for_attention_and_biases():
    """70,433,988 and 87,982,370 of ajbrock/BigGAN-PyTorch, the paper's 158.3 million together (table 1).
    Attention of theirs has an eighth of the channels for queries and keys, a half for values and no biases; the
    convolutions of their generator have some, 3 a block."""
    config = RECIPES["biggan_imagenet_128"]().model
    with torch.device("meta"):
        critic = ProjectionDiscriminator(**config.discriminator_arguments(DATASET_INFO))

    def more_in_attention(channels: int) -> int:
        return 4 * channels**2 + 4 * channels + 2 * channels - (2 * channels**2 // 8 + 2 * channels**2 // 2 + 1)

    biases = 3 * 96 * (16 + 8 + 4 + 2 + 1)
    assert count(build(config)) == 70_433_988 + more_in_attention(192) - biases
    assert count(critic) == 87_982_370 + more_in_attention(96)


def test_priors_of_maskgit_and_of_dalle_2_have_the_sizes_of_their_papers():
    """MaskGIT: 227 million with a VQ-GAN of 54; DALL-E 2's diffusion prior: a billion, 24 layers of width 2,048."""
    assert round((count(build_prior("maskgit_imagenet_256", classes=1000)) + 54e6) / 1e6) == 227
    info = DATASET_INFO.replace(image_embedding_dim=1024, text_states_dim=1024, text_states_length=256)
    with without_memory():
        network = make_network(RECIPES["dalle_2_64_1024"]().diffusion_prior, info)
    assert (len(network.blocks), network.model_dim, f"{count(network):.0e}") == (24, 2048, "1e+09")


@pytest.mark.parametrize(
    ("name", "shape", "logits"),
    [("pixelcnn_imagenet_32", (2, 3, 32, 32), 256), ("vqvae_imagenet_128_pixelcnn", (2, 1, 32, 32), 512)],
)
def test_a_published_pixelcnn_has_20_layers_of_384_features(name: str, shape: tuple[int, ...], logits: int):
    recipe = RECIPES[name]()
    over_tokens = isinstance(recipe, TokenBranchRecipe)
    config, grid = (recipe.prior, recipe.tokenizer.token_grid) if over_tokens else (recipe.model, None)
    with without_memory():
        network = make_network(config, DATASET_INFO, grid)
        values, label = torch.zeros(shape, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        assert network(values, label=label).shape == (*shape, logits)
    assert (len(network.layers), len(network.groups)) == (20, 384)


def test_dalle_s_prior_has_the_sequence_and_the_heads_of_its_paper():
    """64 layers of 62 heads of 64; 256 text tokens of 16,384 words, then 32² of 8,192 codes."""
    network = build_prior("dalle_text_prior", classes=1)
    assert (len(network.blocks), network.num_heads, network.head.in_features // network.num_heads) == (64, 62, 64)
    assert (network.text_length, network.text_embedding.num_embeddings) == (256, 16_384)
    assert (network.grid, network.codebook_size) == ((32, 32), 8192)
    matrices = sum(parameter.numel() for parameter in network.blocks.parameters() if parameter.ndim == 2)
    assert matrices == 64 * 12 * 3968**2


def test_the_classifier_of_512_pixels_computes_norms_of_two_channels_a_group():
    """Its first level is 64 wide, where four channels a group would be 16 groups and another function."""
    norm = build(PAPER_CLASSIFIERS["adm_classifier_512"]).down[0][0].norm_1
    assert (norm.num_channels, norm.num_groups) == (64, 32)
    norm.to_empty(device="cpu")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 64, 8, 8) * torch.rand(64, 1, 1) + torch.randn(64, 1, 1)
    of_32, of_16 = (nn.GroupNorm(groups, 64) for groups in (32, 16))
    for reference in (of_32, of_16):
        reference.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), of_32(x))
    assert (norm(x) - of_16(x)).abs().max() > 0.1


@pytest.mark.parametrize("channels", [4, 8, 12, 24, 32, 48, 64, 96, 128, 160, 192, 224, 1024])
def test_a_norm_that_names_no_groups_has_32_or_keeps_four_channels_in_each(channels: int):
    """Karras et al. (2022): min(32, C / 4); here it divides the channels too."""
    assert GroupNorm(channels).num_groups == math.gcd(channels, min(32, channels // 4)) <= channels // 4


def test_the_patch_discriminator_takes_groups_too():
    with torch.device("meta"):
        assert norms_of(PatchDiscriminator(channels=32)) == [(64, 16), (128, 32), (256, 32)]
        assert norms_of(PatchDiscriminator(channels=32, norm_groups=32)) == [(64, 32), (128, 32), (256, 32)]


def configs_in(part: object) -> Iterator[Config]:
    """Every configuration in a recipe that names groups of norms."""
    if isinstance(part, tuple):
        for each in part:
            yield from configs_in(each)
    elif isinstance(part, Config):
        if isinstance(part, Training) and "norm_groups" in type(part.network).model_fields:
            yield part
        for name in type(part).model_fields:
            yield from configs_in(getattr(part, name))


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - PAPER_RECIPES.keys()))
def test_networks_of_our_own_size_keep_four_channels_in_each_group(name: str):
    """Karras et al.'s number where a recipe names none; row T1's VAE names one group."""
    for config in configs_in(RECIPES[name]()):
        for channels, groups in norms_of(build(config)):
            assert groups == (config.network.norm_groups or math.gcd(channels, min(32, channels // 4))) <= channels // 4


@pytest.mark.parametrize("name", ["openmoji", "classifier_guided", "glide", "dalle2", "imagen", "latent_diffusion"])
def test_groups_that_are_named_are_those_of_every_norm(name: str):
    """Attention too, of each kind, whose widths at published sizes would have 32 groups either way."""
    for config in configs_in(RECIPES[name]()):
        if config.network.kind != "dit":
            assert groups_of(build(config.replace(norm_groups=2))) == {2}


@pytest.mark.parametrize("groups", [7, 48])
def test_groups_that_divide_no_level_are_refused_by_name(groups: int):
    with pytest.raises(ValidationError, match=f"norm_groups {groups} must divide the channels of every level"):
        PAPER_CLASSIFIERS["adm_classifier_512"].replace(norm_groups=groups)
