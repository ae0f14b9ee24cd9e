"""Published networks have their published groups, norm by norm; others keep four channels in each group.

A norm of other groups has as many parameters and computes another function, so no count of parameters notices.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.config import Config
from components.configuration.optimization import Training
from components.models.bundle import NETWORKS
from components.models.critics import PatchDiscriminator
from components.models.layers import GroupNorm
from pipelines.recipes.catalog import RECIPES
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_CLASSIFIERS, PAPER_DIFFUSION

DATASET_INFO = DatasetInfo(num_classes=1000, vocab_size=50_257, text_length=128)

# In all of them 32 groups, at every width: `normalization` of openai/improved-diffusion, guided-diffusion (nn.py),
# openai/glide-text2im (nn.py) and CompVis/latent-diffusion (diffusionmodules/util.py) makes `GroupNorm32` of 32 groups;
# `Normalize` of CompVis/latent-diffusion (diffusionmodules/model.py, as taming-transformers, and attention.py) too; the
# code of DDPM leaves `group_norm` of tf.contrib at its default, 32. The code of Palette and CDM was not published:
# Palette's network is said to be ADM's, and CDM's is ADM's here.
GROUPS = 32

# Width, factors, blocks a level, sides with attention, side, resampling inside of residual blocks.
ADM_SIDES = (32, 16, 8)
UNETS: dict[str, tuple[int, tuple[float, ...], int, tuple[int, ...], int, bool]] = {
    # hojonathanho/diffusion, scripts/run_cifar.py
    "ddpm_cifar_10": (128, (1, 2, 2, 2), 2, (16,), 32, False),
    # openai/improved-diffusion, README: ImageNet-64 with L_hybrid
    "iddpm_imagenet_64": (128, (1, 2, 3, 4), 3, (16, 8), 64, False),
    # openai/guided-diffusion, README, and `create_model` of script_util.py, which has the factors of each side
    "adm_imagenet_64": (192, (1, 2, 3, 4), 3, ADM_SIDES, 64, True),
    "adm_imagenet_128": (256, (1, 1, 2, 3, 4), 2, ADM_SIDES, 128, True),
    "adm_imagenet_256": (256, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    "adm_imagenet_256_unconditional": (256, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    "adm_imagenet_512": (256, (0.5, 1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 512, True),
    "adm_upsampler_64_256": (192, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    "adm_upsampler_128_512": (192, (1, 1, 2, 2, 4, 4), 2, (32, 16), 512, True),
    "cdm_upsampler_64_256": (192, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    "palette": (256, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    # openai/glide-text2im, model_creation.py
    "glide_base": (192, (1, 2, 3, 4), 3, ADM_SIDES, 64, True),
    "glide_upsampler": (192, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    # CompVis/latent-diffusion, configs; attention is given there by how often sides are halved
    "ldm_ffhq_f4": (224, (1, 2, 3, 4), 2, (32, 16, 8), 64, False),
    "ldm_imagenet_f8": (256, (1, 2, 4), 2, (32, 16, 8), 32, False),
    "ldm_imagenet_f4": (192, (1, 2, 3, 5), 2, (32, 16, 8), 64, False),
    "ldm_text_to_image": (320, (1, 2, 4, 4), 2, (32, 16, 8), 32, False),
}
CLASSIFIERS: dict[str, tuple[int, tuple[float, ...], int, tuple[int, ...], int, bool]] = {
    # openai/guided-diffusion, README (depth 4 at 64²) and `create_classifier` of script_util.py
    "adm_classifier_64": (128, (1, 2, 3, 4), 4, ADM_SIDES, 64, True),
    "adm_classifier_128": (128, (1, 1, 2, 3, 4), 2, ADM_SIDES, 128, True),
    "adm_classifier_256": (128, (1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 256, True),
    "adm_classifier_512": (128, (0.5, 1, 1, 2, 2, 4, 4), 2, ADM_SIDES, 512, True),
}
# Factors, sides with attention besides the middle; 128 wide, two blocks a level, 256².
FIRST_STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # CompVis/taming-transformers, configs/imagenet_vqgan.yaml and model.yaml next to the weights of 16,384 codes
    "vqgan_imagenet_f16_1024": ((1, 1, 2, 2, 4), (16,)),
    "vqgan_imagenet_f16_16384": ((1, 1, 2, 2, 4), (16,)),
    # CompVis/latent-diffusion, models/first_stage_models
    "ldm_kl_f4": ((1, 2, 4), ()),
    "ldm_kl_f8": ((1, 2, 4, 4), ()),
    "ldm_kl_f16": ((1, 1, 2, 2, 4), (16,)),
    "ldm_vq_f4": ((1, 2, 4), ()),
    "ldm_vq_f8": ((1, 2, 2, 4), (32,)),
    "ldm_vq_f16": ((1, 1, 2, 2, 4), (16,)),
}
OF_OUR_OWN = {"dalle_dvae_f8_8192", "vqvae_imagenet_128"}  # the published networks have no group norms


def way_down(width: int, mult: Sequence[float], blocks: int, attention: Sequence[int], side: int, resampling: bool):
    """Channels of each norm of a published U-Net's way down and middle, then of each skip."""
    channels = int(width * mult[0])
    norms, skips = [], [channels]
    for level, factor in enumerate(mult):
        for _ in range(blocks):
            norms += [channels, int(width * factor)]  # a residual block: before each of its convolutions
            channels = int(width * factor)
            norms += [channels] if side >> level in attention else []
            skips.append(channels)
        if level < len(mult) - 1:
            norms += [channels, channels] if resampling else []
            skips.append(channels)
    return norms + [channels] * 5, skips


def unet_norms(width: int, mult: Sequence[float], blocks: int, attention: Sequence[int], side: int, resampling: bool):
    """Channels of each norm of a published U-Net, in the order in which an image passes them."""
    norms, skips = way_down(width, mult, blocks, attention, side, resampling)
    channels = norms[-1]
    for level, factor in reversed(list(enumerate(mult))):
        for block in range(blocks + 1):
            norms += [channels + skips.pop(), int(width * factor)]
            channels = int(width * factor)
            norms += [channels] if side >> level in attention else []
            norms += [channels, channels] if resampling and level > 0 and block == blocks else []
    return [*norms, channels]


def classifier_norms(*numbers: Any) -> list[int]:
    norms, _ = way_down(*numbers)
    return [*norms, norms[-1]]


def first_stage_norms(mult: Sequence[int], attention: Sequence[int]) -> list[int]:
    """Of encoder, then decoder, which begins with its middle and has a block more a level."""
    encoder, channels = [], 128
    for level, factor in enumerate(mult):
        for _ in range(2):
            encoder += [channels, 128 * factor, *([128 * factor] if 256 >> level in attention else [])]
            channels = 128 * factor
    decoder = [channels] * 5
    encoder += [channels] * 6
    for level, factor in reversed(list(enumerate(mult))):
        for _ in range(3):
            decoder += [channels, 128 * factor, *([128 * factor] if 256 >> level in attention else [])]
            channels = 128 * factor
    return [*encoder, *decoder, channels]


def arguments_of(config: Config) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of a recipe's network."""
    return config.network.kind, config.network_arguments(DATASET_INFO)


def build(config: Config) -> nn.Module:
    """A recipe's network as its bundle rebuilds it, without weights."""
    kind, network = arguments_of(config)
    with torch.device("meta"):
        return NETWORKS[kind](**json.loads(json.dumps(network)))


def norms_of(network: nn.Module) -> list[tuple[int, int]]:
    """(channels, groups) of each group norm."""
    return [(m.num_channels, m.num_groups) for m in network.modules() if isinstance(m, nn.GroupNorm)]


def published(norms: list[int]) -> list[tuple[int, int]]:
    return [(channels, GROUPS) for channels in norms]


@pytest.mark.parametrize("name", PAPER_DIFFUSION)
def test_every_norm_of_a_published_u_net_has_its_published_groups(name: str):
    assert norms_of(build(PAPER_DIFFUSION[name])) == published(unet_norms(*UNETS[name]))


@pytest.mark.parametrize("name", PAPER_CLASSIFIERS)
def test_every_norm_of_a_published_classifier_has_its_published_groups(name: str):
    assert norms_of(build(PAPER_CLASSIFIERS[name])) == published(classifier_norms(*CLASSIFIERS[name]))


@pytest.mark.parametrize("name", [name for name in AUTOENCODERS if name not in OF_OUR_OWN])
def test_every_norm_of_a_published_autoencoder_has_its_published_groups(name: str):
    assert norms_of(build(AUTOENCODERS[name].training)) == published(first_stage_norms(*FIRST_STAGES[name]))


def test_the_classifier_of_512_pixels_computes_norms_of_two_channels_a_group():
    """Its first level is 64 wide, where four channels a group would be 16 groups and another function."""
    norm = build(PAPER_CLASSIFIERS["adm_classifier_512"]).down[0][0].norm_1
    assert (norm.num_channels, norm.num_groups) == (64, 32)
    norm.to_empty(device="cpu")
    torch.manual_seed(0)
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
    assert GroupNorm(channels).num_groups == math.gcd(channels, min(32, channels // 4))
    assert GroupNorm(channels).num_groups <= channels // 4


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
    for config in configs_in(RECIPES[name]()):
        found = norms_of(build(config))
        assert found == [(channels, math.gcd(channels, min(32, channels // 4))) for channels, _ in found]


@pytest.mark.parametrize("name", ["openmoji", "classifier_guided", "glide", "dalle2", "imagen", "latent_diffusion"])
def test_groups_that_are_named_are_those_of_every_norm(name: str):
    """Attention too, of each kind, whose widths at published sizes would have 32 groups either way."""
    for config in configs_in(RECIPES[name]()):
        if config.network.kind != "dit":
            assert {groups for _, groups in norms_of(build(config.replace(norm_groups=2)))} == {2}


@pytest.mark.parametrize("groups", [7, 48])
def test_groups_that_divide_no_level_are_refused_by_name(groups: int):
    with pytest.raises(ValidationError, match=f"norm_groups {groups} must divide the channels of every level"):
        PAPER_CLASSIFIERS["adm_classifier_512"].replace(norm_groups=groups)
