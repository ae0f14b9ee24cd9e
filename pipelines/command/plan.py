"""`cascade plan`: the stages to run on this machine, or shares and costs on clusters elsewhere."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

from components.configuration.usage import UsageError
from components.stages.images import ImagesConfig
from pipelines.engine import driver
from pipelines.engine.code_seen import changes_of_code
from pipelines.engine.display import plan_table, say
from pipelines.engine.provenance import code_line
from pipelines.engine.session import on_cluster
from pipelines.planning.cost import stage_costs
from pipelines.planning.cost_table import choices_table, cost_notes, cost_overview, cost_table, heading, markdown
from pipelines.planning.preflight import check_shares
from pipelines.planning.profiles import Cluster, Profile, gpu_named, load_profile, parse_cluster, this_machine
from pipelines.planning.reads import reads_of, reads_table, reads_title, reads_warning, tars_in_place
from pipelines.planning.shares import gpu_count, resource_rows, resource_table, share_cluster, trainings
from pipelines.recipes.catalog import load_recipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.workflow import Workflow
from pipelines.workflows import build_workflow

WIDEST = 120  # columns of the table of costs, in a narrow terminal too
PUBLISHED = "published"  # in the place of a recipe: all of them


class Payment(NamedTuple):
    """Options for the price of a run on a cluster's GPUs; None: not stated."""

    gpu: str | None = None  # its name
    price: float | None = None  # of an hour of one
    mfu: float | None = None  # share of its peak that products reach
    images: int | None = None  # of the set

    def check(self, clusters: Sequence[str]) -> None:
        """Raise UsageError for an option without the options that give the option a sense.

        `--price` needs `--gpu`, and `--gpu` a single `--cluster`."""
        if self.gpu is None and (given := [f"--{name}" for name, own in self._asdict().items() if own is not None]):
            raise UsageError(f"{given[0]} needs --gpu, as --gpu h100")
        if self.gpu is not None and len(clusters) != 1:
            raise UsageError("--gpu needs one --cluster, as --cluster gpus=64")
        if self.images is not None and self.images < 1:
            raise UsageError(f"--images must be at least 1, not {self.images}")
        if self.price is not None and self.price < 0:
            raise UsageError(f"--price must be at least 0, not {self.price:g}")


UNPAID = Payment()


def show_plan(options: driver.RunOptions, clusters: Sequence[str], console: Console, *, pay: Payment = UNPAID) -> None:
    """Print the plan of a run on this machine; or a recipe's shares and costs on clusters elsewhere.
    For such clusters neither the source nor storage is asked, so keys and what is cached take no part. Raises
    UsageError, in one line, for whatever is written wrongly."""
    pay.check(clusters)
    if not clusters:
        show_keys(options, console)
        return
    parsed = [parse_cluster(text) for text in clusters]
    profile = load_profile(options.profile, fastest=options.fastest)
    whole = options.recipe == PUBLISHED
    if whole and (options.set or options.only or options.from_ or options.until):
        raise UsageError(f"--recipe {PUBLISHED} is all of them: --set, --only, --from and --until need one")
    recipes = [row() for row in PAPER_RECIPES.values()] if whole else [load_recipe(options.recipe, options.set)]
    workflows = [build_workflow(recipe) for recipe in recipes]
    if pay.gpu is not None:
        gpu = gpu_named(pay.gpu, products=pay.mfu)
        if parsed[0].gpus == 0:
            raise UsageError("--gpu needs a cluster with GPUs, as --cluster gpus=64")
        parsed = [parsed[0]._replace(gpu=gpu)]
    if whole or len(parsed) > 1:
        paid = (
            cost_overview(workflows, profile, parsed[0], pay.price) if pay.gpu else overview(workflows, profile, parsed)
        )
        say(console, "\n".join(paid))
        return
    workflow, cluster = workflows[0], parsed[0]
    shares = share_cluster(workflow, profile, cluster, running=workflow.selected(options))
    check_shares(workflow, shares)
    if pay.gpu is None:
        console.print(resource_table(workflow, profile, cluster, shares))
        return
    costs = stage_costs(workflow, shares, cluster, images=pay.images)
    console.width = max(console.width, WIDEST)
    console.print(cost_table(costs, cluster, pay.price), crop=False)
    for stage in (workflow.by_name[cost.stage] for cost in costs if cost.step and cost.gpus):
        console.print(choices_table(stage, workflow, profile, cluster, shares, pay.price), crop=False)
    for line in cost_notes(workflow, shares, costs, cluster, pay.price):
        say(console, line)


def show_keys(options: driver.RunOptions, console: Console) -> None:
    """Print stages with keys and cache states, shares of this machine's GPUs, reads of tars."""
    prepared = driver.prepare(options)
    console.print(plan_table(prepared.planned))
    for line in prepared.starts:
        say(console, line)
    for line in changes_of_code(prepared.planned):
        say(console, line, "yellow")
    machine = this_machine()
    if machine.gpus and prepared.running and not on_cluster():
        shares = share_cluster(prepared.workflow, prepared.profile, machine, running=prepared.running)
        console.print()
        console.print(resource_table(prepared.workflow, prepared.profile, machine, shares))
    sizes = tars_in_place(prepared.planned)
    if sizes and (rows := reads_of(prepared.planned, prepared.profile, sizes)):
        say(console, f"\n{reads_title(sizes)}")
        console.print(reads_table(rows))
        config = next(stage.config for stage in prepared.workflow.stages if isinstance(stage.config, ImagesConfig))
        for line in reads_warning(rows, config):
            say(console, line, "yellow")
    say(console, f"code: {code_line(prepared.commit)}")


def overview(workflows: Sequence[Workflow], profile: Profile, clusters: Sequence[Cluster]) -> list[str]:
    """All trainings of several recipes on several clusters, as lines of a Markdown table.
    A cell is "workers x samples of a step for each", "in n parts" where the profile says how large one may be, and the
    GPUs that idle meanwhile."""
    lines = heading(["recipe", "training", "batch", *(gpu_count(cluster.gpus) for cluster in clusters)])
    for workflow in workflows:
        cells: dict[str, list[str]] = {name: [] for name in trainings(workflow)}
        for cluster in clusters:
            shares = share_cluster(workflow, profile, cluster)
            check_shares(workflow, shares)
            for row in resource_rows(workflow, profile, cluster, shares):
                if row.stage in cells:
                    parts, idle = (
                        f" in {row.parts} parts" if row.parts else "",
                        f", {row.idle:g} idle" if row.idle else "",
                    )
                    cells[row.stage].append(f"{row.workers} × {row.share}{parts}{idle}")
        for name, config in trainings(workflow).items():
            batch = str(config.optimization.global_batch_size)
            lines.append(markdown([f"`{workflow.name}`", name, batch, *cells[name]]))
    return lines
