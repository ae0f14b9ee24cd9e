"""Costs as tables: of one recipe for the terminal, of several as Markdown."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from components.configuration.optimization import Training
from components.configuration.trainings import AnyTraining
from components.runtime.execution import Resources
from components.runtime.storage.connection import readable_bytes
from pipelines.planning.cluster import Cluster
from pipelines.planning.cost import Rate, StageCost, longest_path, stage_costs
from pipelines.planning.memory_table import markdown, memory_overview
from pipelines.planning.profiles import Profile
from pipelines.planning.publications import compute_lines, published_flops
from pipelines.planning.resource_table import gpu_count
from pipelines.planning.shares import share_cluster
from pipelines.planning.step_memory import memory_warning, step_memory
from pipelines.workflow import Workflow

HOURS_A_DAY = 24
HEADS = (
    *("recipe", "training", "TFLOP/image", "published", "EFLOP", "GPU-hours", "hours"),
    *("memory", "a sample", "samples", "activations", "a GPU", "price"),
)
COLUMNS = (
    *("GPUs", "FLOP/step", "GPU-hours", "time", "read", "written"),
    *("memory", "activations", "a GPU", "price"),
)
UNKNOWN = "–"


def cost_table(costs: Sequence[StageCost], rate: Rate, *, gpu: str, gpus: float) -> Table:
    """One row a stage, and their sum."""
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
        known(cost.read),
        readable_bytes(cost.written),
        *(("", "", "") if step is None else map(known, (step.held, step.activations, step.total))),
        money(cost.gpu_hours, rate),
    )


def cost_notes(
    workflow: Workflow, shares: Mapping[str, Resources], costs: Sequence[StageCost], rate: Rate, *, gpus: float
) -> list[str]:
    """What the table does not say: how long all of it takes, what that costs, and what is not in it."""
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
    """What does not fit a GPU, with what to set, and what can't be counted."""
    lines = []
    for stage in workflow.stages:
        if stage.name in shares and isinstance(stage.config, AnyTraining):
            step = step_memory(stage, workflow.stages, shares[stage.name])
            lines += [f"Activations of {stage.name} are not counted: {step.why}."] if step.why else []
            line = memory_warning(stage, workflow.stages, shares[stage.name], memory=rate.gpu.memory)
            lines += [] if line is None else [line]
    return lines


def cost_overview(workflows: Sequence[Workflow], profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """The trainings of several recipes as lines of a Markdown table; below it what does not fit a GPU, what was
    published of systems, and what each GPU holds.

    The first column of numbers is of one image in a step, forward and backward, what frozen networks add behind a plus;
    the second is the same without those, as published.
    """
    lines = [markdown(HEADS), markdown(["---", "---", *["---:"] * (len(HEADS) - 2)])]
    for workflow in workflows:
        lines += recipe_lines(workflow, profile, cluster, rate)
    notes = [line for workflow in workflows for line in room_lines(workflow, profile, cluster, rate)]
    return [*lines, "", *notes, "", *compute_lines(), "", *memory_overview(workflows, profile, cluster)]


def recipe_lines(workflow: Workflow, profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """Those of one recipe."""
    costs = stage_costs(workflow, share_cluster(workflow, profile, cluster), rate)
    return [markdown(overview_cells(workflow.name, cost, rate)) for cost in costs]


def room_lines(workflow: Workflow, profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """What of one recipe does not fit a GPU, or can't be counted, as items of a Markdown list."""
    shares = share_cluster(workflow, profile, cluster)
    return [f"- `{workflow.name}`: {line}" for line in memory_notes(workflow, shares, rate)]


def overview_cells(recipe: str, cost: StageCost, rate: Rate) -> list[str]:
    """One training's, under HEADS."""
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
        known(step.sample),
        str(step.samples),
        *map(known, (step.activations, step.total)),
        money(cost.gpu_hours, rate),
    ]


def known(count: int | None) -> str:
    return UNKNOWN if count is None else readable_bytes(count)


def readable(count: float) -> str:
    """Three digits where there are fewer, all where there are more: 0.0123, 1.23, 12.3, 1,234."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def span(hours: float) -> str:
    """As days from two of them on."""
    return f"{readable(hours / HOURS_A_DAY)} days" if hours >= 2 * HOURS_A_DAY else f"{readable(hours)} h"


def money(gpu_hours: float, rate: Rate) -> str:
    return "" if rate.price is None else f"{gpu_hours * rate.price:,.2f}"
