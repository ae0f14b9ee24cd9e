"""`cascade plan`: the stages to run on this machine, or shares and costs on clusters elsewhere."""

from collections.abc import Collection, Sequence

from rich import filesize
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
from pipelines.planning.reads import reads_of, reads_table, reads_warning, tars_in_place
from pipelines.planning.shares import gpu_count, resource_rows, resource_table, share_cluster, trainings
from pipelines.recipes.catalog import load_recipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.workflow import Workflow
from pipelines.workflows import build_workflow

WIDEST = 120  # columns of the table of costs, in a narrow terminal too
PUBLISHED = "published"  # in the place of a recipe: all of them


def show_costs(
    options: driver.RunOptions,
    clusters: Sequence[str],
    console: Console,
    *,
    gpu: str | None,
    price: float | None,
    mfu: float | None,
    images: int | None,
) -> None:
    """Print a recipe's shares and costs on clusters elsewhere; neither the source nor storage is asked.
    Options are those of `cascade plan`. Raises UsageError, in one line, for whatever is written wrongly."""
    paid = {"price": price, "mfu": mfu, "images": images}
    if gpu is None and (given := [f"--{name}" for name, own in paid.items() if own is not None]):
        raise UsageError(f"{given[0]} needs --gpu, as --gpu h100")
    if gpu is not None and len(clusters) != 1:
        raise UsageError("--gpu needs one --cluster, as --cluster gpus=64")
    if not clusters:
        show_keys(options, console)
        return
    parsed = [parse_cluster(text) for text in clusters]
    profile = load_profile(options.profile, fastest=options.fastest)
    whole, chosen = options.recipe == PUBLISHED, options.only or options.from_ or options.until
    if whole and (options.set or chosen or images):
        raise UsageError(f"--recipe {PUBLISHED} is all of them: --set, --only, --from, --until and --images need one")
    recipes = [row() for row in PAPER_RECIPES.values()] if whole else [load_recipe(options.recipe, options.set)]
    workflows = [build_workflow(recipe) for recipe in recipes]
    if gpu is not None:
        known = gpu_named(gpu, products=mfu)
        if parsed[0].gpus == 0:
            raise UsageError("--gpu needs a cluster with GPUs, as --cluster gpus=64")
        if parsed[0].gpu is not None and parsed[0].gpu.name != gpu:
            raise UsageError(f"--gpu {gpu}: --cluster {clusters[0]!r} says type={parsed[0].gpu.name}; leave one out")
        parsed = [parsed[0]._replace(gpu=known)]
    for text, cluster in zip(clusters, parsed, strict=True):
        if options.fastest is not None and cluster.gpu is None:
            aim = "--fastest" if options.fastest else "--cheapest"
            raise UsageError(f"{aim}: --cluster {text!r} says no type of GPU to aim by; as gpus=64,type=h100")
    for line in profile.unused({name for workflow in workflows for name in workflow.by_name}):
        say(console, line, "yellow")
    if whole or len(parsed) > 1:
        running = workflows[0].selected(options) if chosen else None
        rows = cost_overview(workflows, profile, parsed[0], price) if gpu else None
        say(console, "\n".join(rows or overview(workflows, profile, parsed, running)))
        return
    workflow, cluster = workflows[0], parsed[0]
    shares = share_cluster(workflow, profile, cluster, running=workflow.selected(options))
    check_shares(workflow, shares)
    if gpu is None:
        console.print(resource_table(workflow, profile, cluster, shares))
        return
    costs = stage_costs(workflow, shares, cluster, images=images)
    console.width = max(console.width, WIDEST)
    console.print(cost_table(costs, cluster, price), crop=False)
    for stage in (workflow.by_name[cost.stage] for cost in costs if cost.step and cost.gpus):
        console.print(choices_table(stage, workflow, profile, cluster, shares, price), crop=False)
    for line in cost_notes(workflow, shares, costs, cluster, price):
        say(console, line)


def show_keys(options: driver.RunOptions, console: Console) -> None:
    """Print stages with keys and cache states, shares of this machine's GPUs, reads of tars."""
    prepared = driver.prepare(options)
    console.print(plan_table(prepared.planned))
    for line in (*prepared.seen, *prepared.starts):
        say(console, line)
    for line in (*prepared.profile.unused(prepared.workflow.by_name), *changes_of_code(prepared.planned)):
        say(console, line, "yellow")
    machine = this_machine()
    if machine.gpus and prepared.running and not on_cluster():
        shares = share_cluster(prepared.workflow, prepared.profile, machine, running=prepared.running)
        console.print()
        console.print(resource_table(prepared.workflow, prepared.profile, machine, shares))
    sizes = tars_in_place(prepared.planned)
    if sizes and (rows := reads_of(prepared.planned, prepared.profile, sizes)):
        tars = f"{len(sizes)} tars of {filesize.decimal(sorted(sizes)[len(sizes) // 2])}, read where they are"
        say(console, f"\n{tars}; bytes read for each byte of the set, an epoch, and what the reader of a worker holds:")
        console.print(reads_table(rows))
        config = next(stage.config for stage in prepared.workflow.stages if isinstance(stage.config, ImagesConfig))
        for line in reads_warning(rows, config):
            say(console, line, "yellow")
    say(console, f"code: {code_line(prepared.commit)}")


def overview(
    workflows: Sequence[Workflow],
    profile: Profile,
    clusters: Sequence[Cluster],
    running: Collection[str] | None = None,
) -> list[str]:
    """Trainings of several recipes on several clusters, as lines of a Markdown table; None: all run.
    A cell is "workers x samples of a step for each", "in n parts" where the profile says so, and the GPUs that idle."""
    lines = heading(["recipe", "training", "batch", *(gpu_count(cluster.gpus) for cluster in clusters)])
    for workflow in workflows:
        trained = {name: own for name, own in trainings(workflow).items() if running is None or name in running}
        cells: dict[str, list[str]] = {name: [] for name in trained}
        for cluster in clusters:
            shares = share_cluster(workflow, profile, cluster, running=running)
            check_shares(workflow, shares)
            for row in resource_rows(workflow, profile, cluster, shares):
                if row.stage in cells:
                    parts = f" in {row.parts} parts" if row.parts else ""
                    idle = f", {row.idle:g} idle" if row.idle else ""
                    cells[row.stage].append(f"{row.workers} × {row.share}{parts}{idle}")
        for name, config in trained.items():
            batch = str(config.optimization.global_batch_size)
            lines.append(markdown([f"`{workflow.name}`", name, batch, *cells[name]]))
    return lines
