"""Tables of costs and memory: of a recipe for the terminal, of several as Markdown."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from components.configuration.optimization import Training
from components.runtime.execution import Resources
from components.runtime.storage.connection import readable_bytes
from components.training.sharding import why_whole
from pipelines.planning.cost import Rate, StageCost, longest_path, stage_costs
from pipelines.planning.memory import device_bytes, memory_warning, model_of
from pipelines.planning.profiles import Cluster, Profile
from pipelines.planning.publications import compute_lines, published_flops
from pipelines.planning.shares import gpu_count, share_cluster
from pipelines.workflow import Stage, Workflow

HOURS_A_DAY = 24
HEADS = (
    *("recipe", "training", "TFLOP/image", "published", "EFLOP", "GPU-hours", "hours"),
    *("memory", "a sample", "samples", "activations", "a GPU", "price"),
)
COLUMNS = (
    *("GPUs", "FLOP/step", "GPU-hours", "time", "read", "written"),
    *("memory", "activations", "a GPU", "price"),
)
MEMORY_HEADS = (
    *("recipe", "training", "weights", "gradients", "optimizer", "averages", "a GPU"),
    *("shards", "parts", "gathered", "a GPU, sharded"),
)
UNKNOWN = "–"


def cost_table(costs: Sequence[StageCost], rate: Rate, *, gpu: str, gpus: float) -> Table:
    """A table of costs with a row for each stage, and the sum."""
    peak = f"{100 * rate.utilization:g} % of {rate.gpu.peak / 1e12:,.0f} TFLOP/s in bf16"
    title = f"{gpu_count(gpus)}: {gpu} at {peak}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(*cost_cells(cost, rate))
    total = sum(cost.gpu_hours for cost in costs)
    table.add_row("sum", "", "", readable(total), "", "", "", "", "", "", money(total, rate), style="bold")
    return table


def cost_cells(cost: StageCost, rate: Rate) -> tuple[str, ...]:
    step = cost.step
    return (
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


def cost_notes(
    workflow: Workflow, shares: Mapping[str, Resources], costs: Sequence[StageCost], rate: Rate, *, gpus: float
) -> list[str]:
    """Lines below the table: hours and price of the longest path, stages left out, memory, precision."""
    stages, hours = longest_path(workflow, costs)
    held = money(hours * gpus, rate)
    lines = [
        f"Longest path: {' → '.join(stages)}, {span(hours)}; {gpu_count(gpus)} for that time: {readable(hours * gpus)} "
    ]
    lines[0] += f"GPU-hours{f', {held}' if held else ''}."
    counted = {cost.stage for cost in costs}
    left_out = [stage.name for stage in workflow.stages if stage.name in shares and stage.name not in counted]
    if left_out:
        lines.append(f"Not counted: {', '.join(left_out)}.")
    lines += memory_notes(workflow, shares, rate)
    slow = [
        stage.name
        for stage in workflow.stages
        if stage.name in counted
        and isinstance(stage.config, Training)
        and stage.config.optimization.precision == "fp32"
    ]
    if slow:
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
    a plus; the second is the same without them, as published.
    """
    lines, notes, memory = heading(HEADS), list[str](), heading(MEMORY_HEADS)
    for workflow in workflows:
        shares = share_cluster(workflow, profile, cluster)
        lines += [markdown(overview_cells(workflow.name, c, rate)) for c in stage_costs(workflow, shares, rate)]
        notes += [f"- `{workflow.name}`: {line}" for line in memory_notes(workflow, shares, rate)]
        memory += [
            markdown(memory_cells(workflow, stage, shards=shares[stage.name].num_workers))
            for stage in workflow.stages
            if isinstance(stage.config, Training)
        ]
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


def heading(names: Sequence[str]) -> list[str]:
    """The first lines of a Markdown table with two columns of words in front."""
    return [markdown(names), markdown(["---", "---", *["---:"] * (len(names) - 2)])]


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
