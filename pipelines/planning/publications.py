"""Published compute of papers' models, beside this house's counts.

Sources: Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", tables 7 and 10; Peebles and Xie
(2023), "Scalable Diffusion Models with Transformers", tables 4 and 6; Rombach et al. (2022), "High-Resolution Image
Synthesis with Latent Diffusion Models", table 18. GLIDE states no compute, LDM none of its first stages' steps, so
that there is nothing to compare.
"""

from functools import cache
from typing import NamedTuple

from components.configuration.conditions import DatasetInfo
from pipelines.planning.cost import GPUS, counted_flops, encoding_flops
from pipelines.planning.memory import step_model
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_DIFFUSION

SECONDS_A_DAY = 24 * 3600
V100 = 120e12  # FLOP/s that ADM takes for the peak of one, in table 7
A100_IN_V100S = 2.2  # LDM's factor, below table 18
IMAGENET = DatasetInfo(num_classes=1000)
BACKWARD = 3  # forward and backward cost as much as three times forward, but for the first layer
OPERATIONS = 2  # of a multiply-add

# Multiply-adds of a network for one image, forward, in billions, by recipe and stage: table 6 of Peebles and Xie, who
# call them Gflops. Its counts are of the denoising network alone.
GMACS = {
    ("adm_imagenet_64_256", "base"): 110,
    ("adm_imagenet_64_256", "upsampler_256"): 632,
    ("adm_imagenet_128_512", "base"): 307,
    ("adm_imagenet_128_512", "upsampler_512"): 2506,
    ("adm_imagenet_256", "base"): 1120,
    ("adm_imagenet_512", "base"): 1983,
    ("ldm_imagenet_f4", "base"): 104,
    ("ldm_imagenet_f8", "base"): 57,
}


def published_flops(recipe: str, stage: str) -> float | None:
    """Published operations of an image in a step; None where the paper states none."""
    gmacs = GMACS.get((recipe, stage))
    return None if gmacs is None else BACKWARD * OPERATIONS * 1e9 * gmacs


class PublishedModel(NamedTuple):
    """A trained model of a published system."""

    model: str  # in the table of published diffusion models
    steps: int  # published
    samples: int  # of a step, published
    utilization: float | None  # published; None: it is not
    autoencoder: str | None = None  # that encodes its images at each step


class Published(NamedTuple):
    """The compute of a system."""

    name: str
    parts: tuple[PublishedModel, ...]
    v100_days: float


COMPUTE = (
    Published("ADM, 128²", (PublishedModel("adm_imagenet_128", 4_360_000, 256, 0.38),), 521),
    Published("ADM, 256²", (PublishedModel("adm_imagenet_256", 1_980_000, 256, 0.36),), 916),
    Published(
        "ADM, 64² to 256²",
        (
            PublishedModel("adm_imagenet_64", 540_000, 2048, 0.41),
            PublishedModel("adm_upsampler_64_256", 500_000, 256, 0.30),
        ),
        329,
    ),
    Published(
        "ADM, 128² to 512²",
        (
            PublishedModel("adm_imagenet_128", 4_360_000, 256, 0.38),
            PublishedModel("adm_upsampler_128_512", 1_050_000, 256, 0.29),
        ),
        1878,
    ),
    Published("LDM-4, FFHQ", (PublishedModel("ldm_ffhq_f4", 635_000, 42, None, "ldm_vq_f4"),), 26),
    Published("LDM-4, ImageNet", (PublishedModel("ldm_imagenet_f4", 178_000, 1200, None, "ldm_vq_f4"),), 271),
    Published("LDM-8, ImageNet", (PublishedModel("ldm_imagenet_f8", 2_900_000, 64, None, "ldm_vq_f8"),), 79),
)


@cache
def part_flops(part: PublishedModel) -> float:
    """Operations of a whole training, from the counted operations of a step."""
    model = step_model(PAPER_DIFFUSION[part.model], IMAGENET)
    image = counted_flops(model).step / model.training.optimization.global_batch_size
    if part.autoencoder is not None:
        image += encoding_flops(step_model(AUTOENCODERS[part.autoencoder].training), "latents")
    return image * part.samples * part.steps


def estimated_v100_days(system: Published) -> float | None:
    """Days from counted operations at the published utilization; None without a published figure."""
    days = 0.0
    for part in system.parts:
        if part.utilization is None:
            return None
        days += part_flops(part) / (V100 * part.utilization) / SECONDS_A_DAY
    return days


def utilization(system: Published) -> float:
    """Utilization by the published days: share of the peak of V100s for ADM, of A100s for LDM."""
    peak = V100 if all(part.utilization for part in system.parts) else GPUS["a100"].peak / A100_IN_V100S
    return sum(map(part_flops, system.parts)) / (peak * system.v100_days * SECONDS_A_DAY)


def compute_lines() -> list[str]:
    """Published systems in Markdown rows: counted operations, with counted and published days."""
    lines = [
        "| system | EFLOP | V100-days, estimate | published | utilization |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for system in COMPUTE:
        estimate, total = estimated_v100_days(system), sum(map(part_flops, system.parts)) / 1e18
        shown = "–" if estimate is None else f"{estimate:.0f}"
        lines.append(
            f"| {system.name} | {total:,.0f} | {shown} | {system.v100_days:g} | {100 * utilization(system):.0f} % |"
        )
    return lines
