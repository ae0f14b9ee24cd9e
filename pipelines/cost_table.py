"""Costs as tables: of one recipe for the terminal, of several as Markdown."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from components.configuration.optimization import Training
from components.execution import Resources
from components.storage.space import readable_bytes
from pipelines.cluster import Cluster
from pipelines.cost import Rate, StageCost, longest_path, stage_costs
from pipelines.memory_table import markdown, memory_overview
from pipelines.profiles import Profile
from pipelines.publications import compute_lines, published_flops
from pipelines.resource_table import gpu_count
from pipelines.shares import share_cluster
from pipelines.workflow import Workflow

HOURS_A_DAY = 24
HEADS = ("recipe", "training", "TFLOP/image", "published", "EFLOP", "GPU-hours", "hours", "memory", "price")


def cost_table(costs: Sequence[StageCost], rate: Rate, *, gpu: str, gpus: float) -> Table:
    """One row a stage, and their sum."""
    peak = f"{100 * rate.utilization:g} % of {rate.gpu.peak / 1e12:,.0f} TFLOP/s in bf16"
    title = f"{gpu_count(gpus)}: {gpu} at {peak}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    for column in ("GPUs", "FLOP/step", "GPU-hours", "time", "read", "written", "memory", "price"):
        table.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(*cost_cells(cost, rate))
    total = sum(cost.gpu_hours for cost in costs)
    table.add_row("sum", "", "", readable(total), "", "", "", "", money(total, rate), style="bold")
    return table


def cost_cells(cost: StageCost, rate: Rate) -> tuple[str, ...]:
    memory = "" if cost.memory is None else readable_bytes(cost.memory)
    return (
        cost.stage,
        f"{cost.gpus:g}",
        "" if cost.step_flops is None else f"{cost.step_flops:.3g}",
        readable(cost.gpu_hours),
        span(cost.hours),
        "–" if cost.read is None else readable_bytes(cost.read),
        readable_bytes(cost.written),
        memory,
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
    large = [cost.stage for cost in costs if cost.memory is not None and cost.memory > rate.gpu.memory]
    if large:
        lines.append(
            f"More than the {readable_bytes(rate.gpu.memory)} of one GPU: {', '.join(large)}; `sharding: full` in the "
            "profile shares it out among the workers."
        )
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
        "Memory is that of weights, gradients, optimizer and averages, and of what shards are gathered to; activations "
        "come on top, and a step's parts are made as large as fits. Bytes read are those of samples before compression."
    )
    return lines


def cost_overview(workflows: Sequence[Workflow], profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """The trainings of several recipes as lines of a Markdown table; below it what was published of systems, and what
    each GPU holds.

    The first column of numbers is of one image in a step, forward and backward, what frozen networks add behind a plus;
    the second is the same without those, as published.
    """
    lines = [markdown(HEADS), markdown(["---", "---", *["---:"] * (len(HEADS) - 2)])]
    for workflow in workflows:
        lines += recipe_lines(workflow, profile, cluster, rate)
    return [*lines, "", *compute_lines(), "", *memory_overview(workflows, profile, cluster)]


def recipe_lines(workflow: Workflow, profile: Profile, cluster: Cluster, rate: Rate) -> list[str]:
    """Those of one recipe."""
    costs = stage_costs(workflow, share_cluster(workflow, profile, cluster), rate)
    return [markdown(overview_cells(workflow.name, cost, rate)) for cost in costs]


def overview_cells(recipe: str, cost: StageCost, rate: Rate) -> list[str]:
    published, step = published_flops(recipe, cost.stage), cost.step_flops or 0
    own, frozen = ((flops / cost.samples) / 1e12 for flops in (step - cost.frozen_flops, cost.frozen_flops))
    return [
        f"`{recipe}`",
        cost.stage,
        f"{own:.3f}" + (f" + {frozen:.3f}" if cost.frozen_flops else ""),
        "" if published is None else f"{published / 1e12:.3f}",
        f"{cost.flops / 1e18:,.3g}" if cost.flops < 1e21 else f"{cost.flops / 1e18:,.0f}",
        readable(cost.gpu_hours),
        readable(cost.hours),
        readable_bytes(cost.memory or 0),
        money(cost.gpu_hours, rate),
    ]


def readable(count: float) -> str:
    """Three digits where there are fewer, all where there are more: 0.0123, 1.23, 12.3, 1,234."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def span(hours: float) -> str:
    """As days from two of them on."""
    return f"{readable(hours / HOURS_A_DAY)} days" if hours >= 2 * HOURS_A_DAY else f"{readable(hours)} h"


def money(gpu_hours: float, rate: Rate) -> str:
    return "" if rate.price is None else f"{gpu_hours * rate.price:,.2f}"
