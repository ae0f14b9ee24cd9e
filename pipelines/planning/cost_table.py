"""Tables of costs and memory, of a recipe for the terminal, of several as Markdown.

Sources of the published numbers: Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", tables 7
and 10; Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", tables 4 and 6; Rombach et al. (2022),
"High-Resolution Image Synthesis with Latent Diffusion Models", table 18. GLIDE states no compute, LDM none of its first
stages' steps, so that there is nothing to compare.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from rich.table import Table

from components.configuration.conditions import DatasetInfo
from components.configuration.optimization import Training
from components.runtime.execution import Resources
from components.runtime.storage.connection import readable_bytes
from components.training.sharding import why_whole
from pipelines.planning.cost import GPUS, Rate, StageCost, counted_flops, encoding_flops, longest_path, stage_costs
from pipelines.planning.memory import device_bytes, memory_warning, model_of, step_model
from pipelines.planning.profiles import Cluster, Profile
from pipelines.planning.shares import gpu_count, share_cluster, table_of, trainings
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_DIFFUSION
from pipelines.workflow import Stage, Workflow

HOURS_A_DAY, SECONDS_A_DAY = 24, 24 * 3600
COLUMNS = ("GPUs", "FLOP/step", "GPU-hours", "time", "read", "written", "memory", "activations", "a GPU", "price")
HEADS = (
    *("recipe", "training", "TFLOP/image", "published", "EFLOP", "GPU-hours", "hours"),
    *("memory", "a sample", "samples", "activations", "a GPU", "price"),
)
MEMORY_HEADS = (
    *("recipe", "training", "weights", "gradients", "optimizer", "averages", "a GPU"),
    *("shards", "parts", "gathered", "a GPU, sharded"),
)
UNKNOWN = "–"
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


def cost_table(costs: Sequence[StageCost], rate: Rate, *, gpu: str, gpus: float) -> Table:
    """A table of costs with a row for each stage, and the sum."""
    peak = f"{100 * rate.utilization:g} % of {rate.gpu.peak / 1e12:,.0f} TFLOP/s in bf16"
    table = table_of("stage", COLUMNS, title=f"{gpu_count(gpus)}: {gpu} at {peak}")
    for cost in costs:
        step = cost.step
        table.add_row(
            cost.stage,
            f"{cost.gpus:g}",
            "" if cost.step_flops is None else f"{cost.step_flops:.3g}",
            readable(cost.gpu_hours),
            span(cost.hours),
            UNKNOWN if cost.read is None else readable_bytes(cost.read),
            readable_bytes(cost.written),
            *(("", "", "") if step is None else map(readable_bytes, (step.held, step.activations, step.total))),
            money(cost.gpu_hours, rate),
        )
    total = sum(cost.gpu_hours for cost in costs)
    table.add_row("sum", "", "", readable(total), "", "", "", "", "", "", money(total, rate), style="bold")
    return table


def cost_notes(
    workflow: Workflow, shares: Mapping[str, Resources], costs: Sequence[StageCost], rate: Rate, *, gpus: float
) -> list[str]:
    """Lines below the table: hours and price of the longest path, stages left out, memory, precision."""
    stages, hours = longest_path(workflow, costs)
    held, path = money(hours * gpus, rate), f"{' → '.join(stages)}, {span(hours)}"
    whole = f"{readable(hours * gpus)} GPU-hours{f', {held}' if held else ''}"
    lines = [f"Longest path: {path}; {gpu_count(gpus)} for that time: {whole}."]
    counted = {cost.stage for cost in costs}
    if left_out := [stage.name for stage in workflow.stages if stage.name in shares and stage.name not in counted]:
        lines.append(f"Not counted: {', '.join(left_out)}.")
    lines += memory_notes(workflow, shares, rate)
    trained = trainings(workflow).items()
    if slow := [name for name, own in trained if name in counted and own.optimization.precision == "fp32"]:
        lines.append(f"In fp32 by their recipe, so slower than a share of bf16 says: {', '.join(slow)}.")
    lines.append(
        "Memory is that of weights, gradients, optimizer and averages, and of what shards are gathered to. Activations "
        "are what a step keeps of the samples that a worker takes at a time; what lives for a moment comes on top. "
        "Without max_batch_per_device a training finds by itself how many fit. Bytes read are those before compression."
    )
    return lines


def memory_notes(workflow: Workflow, shares: Mapping[str, Resources], rate: Rate) -> list[str]:
    """Trainings too large for a GPU, each with settings that help."""
    trained = [stage for stage in workflow.stages if stage.name in shares and isinstance(stage.config, Training)]
    lines = (memory_warning(stage, workflow.stages, shares[stage.name], memory=rate.gpu.memory) for stage in trained)
    return [line for line in lines if line is not None]


def cost_overview(workflows: Sequence[Workflow], profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """Trainings of several recipes as Markdown: costs, warnings, published compute, memory of each GPU.
    The first column of numbers is of one image in a step, forward and backward, with the part of frozen networks behind
    a plus; the second is the same without them, as published."""
    lines, notes, memory = heading(HEADS), list[str](), heading(MEMORY_HEADS)
    for workflow in workflows:
        shares = share_cluster(workflow, profile, cluster)
        lines += [markdown(overview_cells(workflow.name, c, rate)) for c in stage_costs(workflow, shares, rate)]
        notes += [f"- `{workflow.name}`: {line}" for line in memory_notes(workflow, shares, rate)]
        for name in trainings(workflow):
            memory.append(markdown(memory_cells(workflow, workflow.by_name[name], shards=shares[name].num_workers)))
    return [*lines, "", *notes, "", *compute_lines(), "", *memory]


def overview_cells(recipe: str, cost: StageCost, rate: Rate) -> list[str]:
    """The row of a training, under HEADS."""
    published, whole, step = published_flops(recipe, cost.stage), cost.step_flops or 0, cost.step
    own, frozen = ((flops / cost.samples) / 1e12 for flops in (whole - cost.frozen_flops, cost.frozen_flops))
    assert step is not None  # of a training
    return [
        f"`{recipe}`",
        cost.stage,
        f"{own:.3f}" + (f" + {frozen:.3f}" if cost.frozen_flops else ""),
        "" if published is None else f"{published / 1e12:.3f}",
        f"{cost.flops / 1e18:,.3g}" if cost.flops < 1e21 else f"{cost.flops / 1e18:,.0f}",
        readable(cost.gpu_hours),
        readable(cost.hours),
        readable_bytes(step.held),
        readable_bytes(step.needed.sample),
        str(step.samples),
        *map(readable_bytes, (step.activations, step.total)),
        money(cost.gpu_hours, rate),
    ]


def memory_cells(workflow: Workflow, stage: Stage, *, shards: int) -> list[str]:
    """The row of a training, under MEMORY_HEADS: bytes of a whole GPU's copy, and of a shard."""
    model = model_of(stage, workflow.stages)
    whole, cut = device_bytes(model), device_bytes(model, shards=shards)
    cells = [f"`{workflow.name}`", stage.name, *map(readable_bytes, whole[:4]), readable_bytes(sum(whole))]
    if shards == 1 or why_whole(model.training.network.kind) is not None:
        return [*cells, UNKNOWN, "", "", ""]
    return [*cells, str(shards), *map(readable_bytes, (sum(cut[:4]), cut.gathered, sum(cut)))]


def heading(names: Sequence[str], *, words: int = 2) -> list[str]:
    """The first lines of a Markdown table with some columns of words in front."""
    return [markdown(names), markdown([*["---"] * words, *["---:"] * (len(names) - words)])]


def markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def readable(count: float) -> str:
    """Three digits where there are fewer, all where there are more: 0.0123, 1.23, 12.3, 1,234."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def span(hours: float) -> str:
    """Hours as text, in days from two days on."""
    return f"{readable(hours / HOURS_A_DAY)} days" if hours >= 2 * HOURS_A_DAY else f"{readable(hours)} h"


def money(gpu_hours: float, rate: Rate) -> str:
    return "" if rate.price is None else f"{gpu_hours * rate.price:,.2f}"


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
    v100_days: float
    parts: tuple[PublishedModel, ...]

    @property
    def estimated_days(self) -> float | None:
        """Days of V100s from counted operations at the published utilization; None without a published one."""
        shares = [(part_flops(part), part.utilization) for part in self.parts]
        if any(share is None for _, share in shares):
            return None
        return sum(flops / (V100 * (share or 0)) / SECONDS_A_DAY for flops, share in shares)

    @property
    def utilization(self) -> float:
        """Utilization by the published days: share of the peak of V100s for ADM, of A100s for LDM."""
        peak = V100 if all(part.utilization for part in self.parts) else GPUS["a100"].peak / A100_IN_V100S
        return sum(map(part_flops, self.parts)) / (peak * self.v100_days * SECONDS_A_DAY)


ADM_128 = PublishedModel("adm_imagenet_128", 4_360_000, 256, 0.38)
ADM_64 = PublishedModel("adm_imagenet_64", 540_000, 2048, 0.41)
COMPUTE = (
    Published("ADM, 128²", 521, (ADM_128,)),
    Published("ADM, 256²", 916, (PublishedModel("adm_imagenet_256", 1_980_000, 256, 0.36),)),
    Published("ADM, 64² to 256²", 329, (ADM_64, PublishedModel("adm_upsampler_64_256", 500_000, 256, 0.30))),
    Published("ADM, 128² to 512²", 1878, (ADM_128, PublishedModel("adm_upsampler_128_512", 1_050_000, 256, 0.29))),
    Published("LDM-4, FFHQ", 26, (PublishedModel("ldm_ffhq_f4", 635_000, 42, None, "ldm_vq_f4"),)),
    Published("LDM-4, ImageNet", 271, (PublishedModel("ldm_imagenet_f4", 178_000, 1200, None, "ldm_vq_f4"),)),
    Published("LDM-8, ImageNet", 79, (PublishedModel("ldm_imagenet_f8", 2_900_000, 64, None, "ldm_vq_f8"),)),
)


@cache
def part_flops(part: PublishedModel) -> float:
    """Operations of a whole training, from the counted operations of a step."""
    model = step_model(PAPER_DIFFUSION[part.model], IMAGENET)
    image = counted_flops(model).step / model.training.optimization.global_batch_size
    if part.autoencoder is not None:
        image += encoding_flops(step_model(AUTOENCODERS[part.autoencoder].training), "latents")
    return image * part.samples * part.steps


def compute_lines() -> list[str]:
    """Published systems in Markdown rows: counted operations, with counted and published days."""
    lines = heading(("system", "EFLOP", "V100-days, estimate", "published", "utilization"), words=1)
    for system in COMPUTE:
        days, flops = system.estimated_days, sum(map(part_flops, system.parts)) / 1e18
        shown, share = UNKNOWN if days is None else f"{days:.0f}", f"{100 * system.utilization:.0f} %"
        lines.append(markdown([system.name, f"{flops:,.0f}", shown, f"{system.v100_days:g}", share]))
    return lines
