"""`cascade plan`: what would run here, or how recipes would share clusters that are not here."""

from collections.abc import Sequence

from rich.console import Console

from pipelines import driver
from pipelines.cluster import Cluster, parse_cluster, this_machine
from pipelines.display import plan_table
from pipelines.preflight import check_batches, trainings
from pipelines.profiles import Profile, load_profile
from pipelines.recipes.catalog import load_recipe
from pipelines.recipes.paper import paper_recipes
from pipelines.resource_table import gpu_count, resource_rows, resource_table
from pipelines.session import on_cluster
from pipelines.shares import share_cluster
from pipelines.workflow import UsageError, Workflow
from pipelines.workflows import build_workflow

PUBLISHED = "published"  # in the place of a recipe: all of them


def show_plan(options: driver.RunOptions, clusters: Sequence[str], console: Console) -> None:
    """Print the plan of a run on this machine; or, of clusters that are not here, how a recipe shares them.

    For such clusters neither the source nor storage is asked, so keys and what is cached take no part. Raises
    UsageError, in one line, for whatever is written wrongly.
    """
    if not clusters:
        show_keys(options, console)
        return
    told = [parse_cluster(text) for text in clusters]
    profile = load_profile(options.profile)
    if options.recipe == PUBLISHED:
        if options.set or options.only or options.from_ or options.until:
            raise UsageError(f"--recipe {PUBLISHED} is all of them: --set, --only, --from and --until need one")
        workflows = [build_workflow(recipe()) for recipe in paper_recipes().values()]
    else:
        workflows = [build_workflow(load_recipe(options.recipe, options.set))]
    if len(workflows) == len(told) == 1:
        show_shares(workflows[0], profile, told[0], options, console)
    else:
        console.print("\n".join(overview(workflows, profile, told)), soft_wrap=True, markup=False, highlight=False)


def show_keys(options: driver.RunOptions, console: Console) -> None:
    """Each stage, its key and whether it is cached; and how those that would run share the GPUs of this machine."""
    prepared = driver.prepare(options)
    console.print(plan_table(prepared.planned))
    machine = this_machine()
    running = [entry.stage.name for entry in prepared.planned if entry.wanted]
    if machine.gpus and running and not on_cluster():
        shares = share_cluster(prepared.workflow, prepared.profile, machine, running=running)
        console.print()
        console.print(resource_table(prepared.workflow, prepared.profile, machine, shares))


def show_shares(
    workflow: Workflow, profile: Profile, cluster: Cluster, options: driver.RunOptions, console: Console
) -> None:
    """How the stages that are selected share a cluster."""
    running = workflow.selected(driver.selection_of(options))
    shares = share_cluster(workflow, profile, cluster, running=running)
    check_batches(workflow, shares)
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
