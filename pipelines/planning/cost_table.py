"""Tables of costs and memory, of a recipe for the terminal, of several as Markdown.

Sources of the published numbers: Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", tables 7
and 10; Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", tables 4 and 6; Rombach et al. (2022),
"High-Resolution Image Synthesis with Latent Diffusion Models", table 18. GLIDE states no compute, LDM none of its first
stages' steps, so that there is nothing to compare.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from rich import filesize
from rich.table import Table

from components.configuration.conditions import DatasetInfo
from components.evaluation.report import number
from components.runtime.execution import Resources
from pipelines.planning.cost import StageCost, choices, counted_flops, encoding_flops, longest_path, stage_costs
from pipelines.planning.memory import memory_warning, step_model
from pipelines.planning.preflight import check_shares
from pipelines.planning.profiles import GPU, GPUS, Cluster, Profile
from pipelines.planning.shares import gpu_count, share_cluster, table_of, trainings, worker_counts
from pipelines.planning.step_time import StepTime, encoding_work, step_time
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_DIFFUSION
from pipelines.workflow import Stage, Workflow

HOURS_A_DAY, SECONDS_A_DAY = 24, 24 * 3600
COLUMNS = ("GPUs", "FLOP/step", "GPU-hours", "time", "read", "written", "memory", "activations", "a GPU", "price")
TERMS = ("launches", "memory", "products", "network", "step, ms")
HEADS = (
    *("recipe", "training", "TFLOP/image", "published", "EFLOP", "GPUs", *TERMS, "GPU-hours", "hours", "price"),
    *("held", "a sample", "samples", "activations", "a GPU"),
)
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
    ("dit_imagenet_256", "base"): 119,
}


def cost_table(costs: Sequence[StageCost], cluster: Cluster, price: float | None) -> Table:
    """A table of costs with a row for each stage, and the sum. `price`: of an hour of a GPU."""
    gpu = cluster.known_gpu
    peak = f"{100 * gpu.products:g} % of {gpu.peak / 1e12:,.0f} TFLOP/s in bf16"
    table = table_of("stage", COLUMNS, title=f"{gpu_count(cluster.gpus)}: {gpu.name}, products at {peak}")
    for cost in costs:
        step = cost.step
        table.add_row(
            cost.stage,
            f"{cost.gpus:g}",
            "" if cost.step_flops is None else f"{cost.step_flops:.3g}",
            number(cost.gpu_hours),
            span(cost.hours),
            filesize.decimal(cost.read),
            filesize.decimal(cost.written),
            *(("", "", "") if step is None else map(filesize.decimal, (step.held, step.activations, step.total))),
            money(cost.gpu_hours, price),
        )
    total = sum(cost.gpu_hours for cost in costs)
    table.add_row("sum", "", "", number(total), "", "", "", "", "", "", money(total, price), style="bold")
    return table


def choices_table(
    stage: Stage,
    workflow: Workflow,
    profile: Profile,
    cluster: Cluster,
    shares: Mapping[str, Resources],
    price: float | None,
) -> Table:
    """Hours and price of a training over its possible numbers of workers; the run's own is marked."""
    factor, resources = cluster.known_gpu.measured, shares[stage.name]
    own, gpus = resources.num_workers, resources.gpus_per_worker
    measured = "uncalibrated" if factor is None else f"measured, {factor:.3g} times the model"
    table = table_of("workers", (*TERMS, "time", "GPU-hours", "price", "fits"), title=f"{stage.name}: {measured}")
    counts = worker_counts(stage, cluster, resources.sharding, least=1, most=int(cluster.gpus / gpus))
    for choice in choices(stage, profile, cluster, sorted({*counts, own})):
        hours = choice.worker_hours * gpus
        mark = " *" if choice.workers == own else ""
        cells = (*milliseconds(choice.time), span(choice.hours), number(hours), money(hours, price))
        table.add_row(f"{choice.workers}{mark}", *cells, "" if choice.fits else "no", style="bold" if mark else None)
    return table


def milliseconds(time: StepTime) -> list[str]:  # under TERMS
    return [number(1000 * seconds) for seconds in (*time, time.seconds)]


def cost_notes(
    workflow: Workflow,
    shares: Mapping[str, Resources],
    costs: Sequence[StageCost],
    cluster: Cluster,
    price: float | None,
) -> list[str]:
    """Lines below the table: hours and price of the longest path, stages left out, memory, precision."""
    stages, hours = longest_path(workflow, costs)
    held, path = money(hours * cluster.gpus, price), f"{' → '.join(stages)}, {span(hours)}"
    whole = f"{number(hours * cluster.gpus)} GPU-hours{f', {held}' if held else ''}"
    counted, trained = {cost.stage for cost in costs}, trainings(workflow).items()
    left_out = [stage.name for stage in workflow.stages if stage.name in shares and stage.name not in counted]
    slow = [name for name, own in trained if name in counted and own.optimization.precision == "fp32"]
    return [
        "A step takes the longer of launches and memory + products, then the network. "
        "The knee has the least hours × price.",
        f"Longest path: {path}; {gpu_count(cluster.gpus)} for that time: {whole}.",
        *([f"Not counted: {', '.join(left_out)}."] if left_out else []),
        *memory_notes(workflow, shares, cluster.known_gpu),
        *([f"In fp32 by their recipe, so slower: {', '.join(slow)}."] if slow else []),
        "Memory is that of weights, gradients, optimizer, averages, gathered shards; activations are those kept of the "
        "samples at a time. Bytes read are before compression.",
    ]


def memory_notes(workflow: Workflow, shares: Mapping[str, Resources], gpu: GPU) -> list[str]:
    """Trainings too large for a GPU, each with settings that help."""
    trained = [stage for stage in workflow.stages if stage.name in shares.keys() & trainings(workflow)]
    lines = (memory_warning(stage, shares[stage.name], memory=gpu.memory) for stage in trained)
    return [line for line in lines if line is not None]


def cost_overview(workflows: Sequence[Workflow], profile: Profile, cluster: Cluster, price: float | None) -> list[str]:
    """Trainings of several recipes as Markdown: costs, warnings, published compute.
    The first column of numbers is of one image in a step, forward and backward, with the part of frozen networks behind
    a plus; the second is the same without them, as published."""
    lines, notes = heading(HEADS), list[str]()
    for workflow in workflows:
        shares = share_cluster(workflow, profile, cluster)
        check_shares(workflow, shares)
        for cost in stage_costs(workflow, shares, cluster):
            published, whole, step = published_flops(workflow.name, cost.stage), cost.step_flops or 0, cost.step
            own, frozen = ((flops / cost.samples) / 1e12 for flops in (whole - cost.frozen_flops, cost.frozen_flops))
            assert step is not None  # of a training
            assert cost.time is not None
            cells = [
                f"`{workflow.name}`",
                cost.stage,
                f"{own:.3f}" + (f" + {frozen:.3f}" if cost.frozen_flops else ""),
                "" if published is None else f"{published / 1e12:.3f}",
                f"{cost.flops / 1e18:,.3g}" if cost.flops < 1e21 else f"{cost.flops / 1e18:,.0f}",
                f"{cost.gpus:g}",
                *milliseconds(cost.time),
                number(cost.gpu_hours),
                number(cost.hours),
                money(cost.gpu_hours, price),
                filesize.decimal(step.held),
                filesize.decimal(step.needed.sample),
                str(step.samples),
                *map(filesize.decimal, (step.activations, step.total)),
            ]
            lines.append(markdown(cells))
        notes += [f"- `{workflow.name}`: {line}" for line in memory_notes(workflow, shares, cluster.known_gpu)]
    return [*lines, "", *notes, "", *compute_lines()]


def heading(names: Sequence[str], *, words: int = 2) -> list[str]:
    """The first lines of a Markdown table with some columns of words in front."""
    return [markdown(names), markdown([*["---"] * words, *["---:"] * (len(names) - words)])]


def markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def span(hours: float) -> str:
    """Hours as text, in days from two days on."""
    return f"{number(hours / HOURS_A_DAY)} days" if hours >= 2 * HOURS_A_DAY else f"{number(hours)} h"


def money(gpu_hours: float, price: float | None) -> str:
    return "" if price is None else f"{gpu_hours * price:,.2f}"


def published_flops(recipe: str, stage: str) -> float | None:
    """Published operations of an image in a step; None where the paper states none."""
    gmacs = GMACS.get((recipe, stage))
    return None if gmacs is None else BACKWARD * OPERATIONS * 1e9 * gmacs


class PublishedModel(NamedTuple):
    """A trained model of a published system."""

    model: str  # in the table of published diffusion models
    steps: int  # published
    samples: int  # of a step, published
    autoencoder: str | None = None  # that encodes its images at each step


class Published(NamedTuple):
    """The compute of a system."""

    name: str
    v100_days: float
    cluster: Cluster  # that its step is modeled on
    parts: tuple[PublishedModel, ...]

    @property
    def modeled_days(self) -> float:
        """Days of V100s by the modeled seconds of a step."""
        seconds = sum(part.steps * part_time(part, self.cluster).seconds for part in self.parts)
        factor = 1 if self.cluster is V100S else A100_IN_V100S
        return seconds * self.cluster.gpus * factor / SECONDS_A_DAY

    @property
    def utilization(self) -> float:
        """Utilization by the published days: share of the peak of V100s for ADM, of A100s for LDM."""
        peak = V100 if self.cluster is V100S else GPUS["a100"].peak / A100_IN_V100S
        return sum(map(part_flops, self.parts)) / (peak * self.v100_days * SECONDS_A_DAY)


ADM_128 = PublishedModel("adm_imagenet_128", 4_360_000, 256)
ADM_256 = PublishedModel("adm_imagenet_256", 1_980_000, 256)
ADM_64 = PublishedModel("adm_imagenet_64", 540_000, 2048)
V100S = Cluster(1, gpus=8, gpu=GPU("v100", 125e12, 32e9, 900e9, 150e9, 12.5e9))  # NVIDIA's data sheet, SXM2, in fp16
A100S = Cluster(1, gpus=1, gpu=GPUS["a100"])
COMPUTE = (
    Published("ADM, 128²", 521, V100S, (ADM_128,)),
    Published("ADM, 256²", 916, V100S, (ADM_256,)),
    Published("ADM, 64² to 256²", 329, V100S, (ADM_64, PublishedModel("adm_upsampler_64_256", 500_000, 256))),
    Published("ADM, 128² to 512²", 1878, V100S, (ADM_128, PublishedModel("adm_upsampler_128_512", 1_050_000, 256))),
    Published("LDM-4, FFHQ", 26, A100S, (PublishedModel("ldm_ffhq_f4", 635_000, 42, "ldm_vq_f4"),)),
    Published("LDM-4, ImageNet", 271, A100S, (PublishedModel("ldm_imagenet_f4", 178_000, 1200, "ldm_vq_f4"),)),
    Published("LDM-8, ImageNet", 79, A100S, (PublishedModel("ldm_imagenet_f8", 2_900_000, 64, "ldm_vq_f8"),)),
)


@cache
def part_flops(part: PublishedModel) -> float:
    """Operations of a whole training, from the counted operations of a step."""
    model = step_model(PAPER_DIFFUSION[part.model], IMAGENET)
    image = counted_flops(model).step / model.training.optimization.global_batch_size
    if part.autoencoder is not None:
        image += encoding_flops(step_model(AUTOENCODERS[part.autoencoder].training), "latents")
    return image * part.samples * part.steps


@cache
def part_time(part: PublishedModel, cluster: Cluster) -> StepTime:
    """Seconds of a step of the published batch on all GPUs of a cluster."""
    model = step_model(PAPER_DIFFUSION[part.model].replace(global_batch_size=part.samples), IMAGENET)
    frozen = [encoding_work(step_model(AUTOENCODERS[name].training), "latents") for name in (part.autoencoder,) if name]
    resources = Resources(num_workers=int(cluster.gpus), gpus_per_worker=1)
    flops = part_flops(part) / part.steps  # of frozen networks too: no published system computes activations again
    return step_time(model, resources, cluster, frozen=frozen, flops=flops)


def compute_lines() -> list[str]:
    """Published systems in Markdown rows: operations, days published and modeled, terms of a step."""
    lines = heading(("system", "EFLOP", "V100-days", "utilization", "modeled", *TERMS), words=1)
    for system in COMPUTE:
        times = [milliseconds(part_time(part, system.cluster)) for part in system.parts]
        flops, share = sum(map(part_flops, system.parts)) / 1e18, f"{100 * system.utilization:.0f} %"
        numbers = (f"{flops:,.0f}", f"{system.v100_days:g}", share, f"{system.modeled_days:.0f}")
        lines.append(markdown([system.name, *numbers, *map("; ".join, zip(*times, strict=True))]))
    return lines
