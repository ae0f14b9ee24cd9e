"""The published diffusion networks and classifiers have their published number of parameters; none is left out."""

import pytest
import torch
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.models.bundle import NETWORKS
from components.models.noisy_classifier import NoisyClassifier
from pipelines.recipes.published import PAPER_BRANCHES, diffusion_branch
from pipelines.recipes.published_networks import PAPER_CLASSIFIERS, PAPER_DIFFUSION

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
    ("name", "published"),
    zip(PAPER_CLASSIFIERS, (65_438_568, 42_568_040, 54_096_360, 54_448_360), strict=True),
)
def test_a_published_classifier_has_its_published_size(name: str, published: int):
    with torch.device("meta"):
        assert count(NoisyClassifier(**PAPER_CLASSIFIERS[name].network_arguments(DATASET_INFO))) == published


@pytest.mark.parametrize("name", PAPER_BRANCHES)
def test_a_published_classifier_knows_the_noise_of_the_guided_model(name: str):
    recipe = diffusion_branch(name, PAPER_BRANCHES[name])
    classifier, base = recipe.classifier, recipe.base
    if classifier is not None:
        assert classifier.data.resolution == base.data.resolution
        process = classifier.process.objective()
        del process["prediction_type"]  # which says nothing of the noise
        assert process.items() <= base.process.objective().items()


def test_palette_is_the_unconditional_network_of_adm_with_a_image_and_without_a_variance():
    adm = build(PAPER_DIFFUSION["adm_imagenet_256_unconditional"])
    more = 4 * 256 * 9  # four more channels go in: an image and its mask
    fewer = 3 * 256 * 9 + 3  # and three fewer come out
    assert count(build(PAPER_DIFFUSION["palette"])) == count(adm) + more - fewer
