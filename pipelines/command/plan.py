"""`cascade plan`: the stages to run on this machine, or shares and costs on clusters elsewhere."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

from components.configuration.usage import UsageError
from components.stages.images import ImagesConfig
from pipelines.engine import driver
from pipelines.engine.code_seen import changes_of_code
from pipelines.engine.display import plan_table
from pipelines.engine.provenance import code_line
from pipelines.engine.session import on_cluster
from pipelines.planning.cost import UTILIZATION, rate_of, stage_costs
from pipelines.planning.cost_table import cost_notes, cost_overview, cost_table
from pipelines.planning.preflight import check_batches, check_sharding
from pipelines.planning.profiles import Cluster, Profile, load_profile, parse_cluster, this_machine
from pipelines.planning.shares import gpu_count, resource_rows, resource_table, share_cluster, trainings
from pipelines.planning.tar_reads import reads_table, reads_title, reads_warning, tar_reads, tars_in_place
from pipelines.recipes.catalog import load_recipe
from pipelines.recipes.published import paper_recipes
from pipelines.workflow import Workflow
from pipelines.workflows import build_workflow

WIDEST = 120  # columns of the table of costs, in a narrow terminal too
PUBLISHED = "published"  # in the place of a recipe: all of them


class Payment(NamedTuple):
    """Options for the price of a run on a cluster's GPUs; None: not stated."""

    gpu: str | None = None  # its name
    price: float | None = None  # of an hour of one
    mfu: float | None = None  # share of its peak that is used
    images: int | None = None  # of the set


UNPAID = Payment()


def show_plan(options: driver.RunOptions, clusters: Sequence[str], console: Console, *, pay: Payment = UNPAID) -> None:
    """Print the plan of a run on this machine; or a recipe's shares and costs on clusters elsewhere.

    For such clusters neither the source nor storage is asked, so keys and what is cached take no part. Raises
    UsageError, in one line, for whatever is written wrongly.
    """
    check_payment(pay, clusters)
    if not clusters:
        show_keys(options, console)
        return
    parsed = [parse_cluster(text) for text in clusters]
    profile = load_profile(options.profile)
    if options.recipe == PUBLISHED:
        if options.set or options.only or options.from_ or options.until:
            raise UsageError(f"--recipe {PUBLISHED} is all of them: --set, --only, --from and --until need one")
        workflows = [build_workflow(recipe()) for recipe in paper_recipes().values()]
    else:
        workflows = [build_workflow(load_recipe(options.recipe, options.set))]
    if pay.gpu is not None:
        show_costs(workflows, profile, parsed[0], options, pay, console)
    elif len(workflows) == len(parsed) == 1:
        show_shares(workflows[0], profile, parsed[0], options, console)
    else:
        console.print("\n".join(overview(workflows, profile, parsed)), soft_wrap=True, markup=False, highlight=False)


def check_payment(pay: Payment, clusters: Sequence[str]) -> None:
    """Raise UsageError for a payment option without the options that give the option a sense.

    `--price` needs `--gpu`, and `--gpu` a single `--cluster`.
    """
    if pay.gpu is None and (given := [f"--{name}" for name, value in pay._asdict().items() if value is not None]):
        raise UsageError(f"{given[0]} needs --gpu, as --gpu h100")
    if pay.gpu is not None and len(clusters) != 1:
        raise UsageError("--gpu needs one --cluster, as --cluster gpus=64")
    if pay.images is not None and pay.images < 1:
        raise UsageError(f"--images must be at least 1, not {pay.images}")


def show_costs(
    workflows: Sequence[Workflow],
    profile: Profile,
    cluster: Cluster,
    options: driver.RunOptions,
    pay: Payment,
    console: Console,
) -> None:
    """Print costs of the selected stages on a cluster; of several recipes the trainings, as Markdown."""
    assert pay.gpu is not None
    rate = rate_of(pay.gpu, utilization=UTILIZATION if pay.mfu is None else pay.mfu, price=pay.price)
    if cluster.gpus == 0:
        raise UsageError("--gpu needs a cluster with GPUs, as --cluster gpus=64")
    if options.recipe == PUBLISHED:
        lines = cost_overview(workflows, profile, cluster, rate)
        console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
        return
    (workflow,) = workflows
    shares = share_cluster(workflow, profile, cluster, running=workflow.selected(driver.selection_of(options)))
    check_batches(workflow, shares)
    check_sharding(workflow, shares)
    costs = stage_costs(workflow, shares, rate, images=pay.images)
    table = cost_table(costs, rate, gpu=pay.gpu, gpus=cluster.gpus)
    console.width = max(console.width, WIDEST)
    console.print(table, crop=False)
    for line in cost_notes(workflow, shares, costs, rate, gpus=cluster.gpus):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def show_keys(options: driver.RunOptions, console: Console) -> None:
    """Print each stage with key and cache state, and the shares of this machine's GPUs."""
    prepared = driver.prepare(options)
    console.print(plan_table(prepared.planned))
    for line in changes_of_code(prepared.planned):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    machine = this_machine()
    running = [entry.stage.name for entry in prepared.planned if entry.wanted]
    if machine.gpus and running and not on_cluster():
        shares = share_cluster(prepared.workflow, prepared.profile, machine, running=running)
        console.print()
        console.print(resource_table(prepared.workflow, prepared.profile, machine, shares))
    show_reads(prepared, console)
    console.print(f"code: {code_line(prepared.commit)}", highlight=False, soft_wrap=True)


def show_reads(prepared: driver.Prepared, console: Console) -> None:
    """Print the read amplification of tars that stay in the user's place, with a warning."""
    index = tars_in_place(prepared.planned)
    rows = [] if index is None else tar_reads(prepared.planned, prepared.profile, index)
    if index is None or not rows:
        return
    console.print(f"\n{reads_title(index)}", soft_wrap=True, highlight=False)
    console.print(reads_table(rows))
    config = next(stage.config for stage in prepared.workflow.stages if isinstance(stage.config, ImagesConfig))
    for line in reads_warning(rows, index, config):
        console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)


def show_shares(
    workflow: Workflow, profile: Profile, cluster: Cluster, options: driver.RunOptions, console: Console
) -> None:
    """Print the shares of a cluster for the selected stages."""
    running = workflow.selected(driver.selection_of(options))
    shares = share_cluster(workflow, profile, cluster, running=running)
    check_batches(workflow, shares)
    check_sharding(workflow, shares)
    console.print(resource_table(workflow, profile, cluster, shares))


def overview(workflows: Sequence[Workflow], profile: Profile, clusters: Sequence[Cluster]) -> list[str]:
    """All trainings of several recipes on several clusters, as lines of a Markdown table.

    A cell is "workers x samples of a step for each", "in n parts" where the profile says how large one may be, and the
    GPUs that idle meanwhile.
    """
    heads = ["recipe", "training", "batch", *(gpu_count(cluster.gpus) for cluster in clusters)]
    lines = [heads, ["---", "---", *["---:" for _ in heads[2:]]]]
    for workflow in workflows:
        cells: dict[str, list[str]] = {name: [] for name in trainings(workflow)}
        for cluster in clusters:
            shares = share_cluster(workflow, profile, cluster)
            check_batches(workflow, shares)
            check_sharding(workflow, shares)
            for row in resource_rows(workflow, profile, cluster, shares):
                if row.stage in cells:
                    cells[row.stage].append(
                        f"{row.workers} × {row.share}"
                        + (f" in {row.parts} parts" if row.parts else "")
                        + (f", {row.idle:g} idle" if row.idle else "")
                    )
        for name, config in trainings(workflow).items():
            lines.append([f"`{workflow.name}`", name, str(config.optimization.global_batch_size), *cells[name]])
    return [f"| {' | '.join(line)} |" for line in lines]
