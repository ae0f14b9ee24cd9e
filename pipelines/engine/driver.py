"""A run from the command line to the report: check, plan, execute, publish, render."""

import logging
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import ray
from rich.console import Console

from components.configuration.usage import UsageError
from components.runtime import events
from components.runtime.execution import Profiling, Resources
from components.runtime.storage.store import Store, StoreError, absolute
from components.runtime.tracking.names import environment, registered_name
from pipelines.engine.code_seen import changes_of_code
from pipelines.engine.display import Display, duration, run_tables
from pipelines.engine.execute import Outcome, execute
from pipelines.engine.naming import cascade_name, data_identity, model_card
from pipelines.engine.provenance import code_line, commit
from pipelines.engine.recorder import RunRecorder, StageStatus
from pipelines.engine.run_report import REPORT, TRACES, announced, link_pages, render_run, save_run, traces_of
from pipelines.engine.session import on_cluster, set_environment, start_ray
from pipelines.planning.preflight import (
    Needs,
    check_batches,
    check_needs,
    check_nodes,
    check_sharding,
    needs_of,
    space_of,
)
from pipelines.planning.profiles import Profile, load_profile, parse_cluster, storage_uri, tracking_uri
from pipelines.planning.shares import resource_table, share_cluster, trainings
from pipelines.recipes.catalog import DEMO, load_recipe, resolved_yaml
from pipelines.recipes.shapes import Recipe
from pipelines.workflow import PlannedStage, Selection, Workflow
from pipelines.workflows import build_workflow

logger = logging.getLogger("cascade")
DONE, FAILED, INTERRUPTED = 0, 1, 130
MOST_STEPS = 100  # under the profiler: a step leaves some MB in memory and in the file


@dataclass(frozen=True)
class RunOptions:
    """Options of `cascade run`."""

    recipe: str = DEMO
    set: list[str] = field(default_factory=list)
    storage: str | None = None
    tracking: str | None = None
    profile: str = "auto"
    name: str | None = None
    run: str | None = None
    only: list[str] = field(default_factory=list)
    from_: str | None = None
    until: str | None = None
    force: bool = False
    verbose: bool = False
    profile_steps: str | None = None  # of each training, recorded by torch.profiler, as 20:25
    cluster: str | None = None  # what a cluster will have that has less now, as gpus=8,cpus=64
    promote: events.Promote = "better"


@dataclass(frozen=True)
class Prepared:
    """All facts of a run before anything starts."""

    recipe: Recipe
    workflow: Workflow
    profile: Profile
    root: Store
    tracking: str | None
    name: str  # of the models, in MLflow's registry
    run: str
    planned: list[PlannedStage]
    needs: Needs
    commit: str  # of the code, as `provenance.commit` has it
    profiling: Profiling | None = None


def prepare(options: RunOptions) -> Prepared:
    """Load and check recipe, profile, storage and source, and plan.

    Raises UsageError, StoreError or SourceError, each one line, before anything starts.
    """
    recipe = load_recipe(options.recipe, options.set)
    name = cascade_name(recipe, options.name)
    profile = load_profile(options.profile)
    root = Store(storage_uri(options.storage))
    workflow = build_workflow(recipe)
    root.check_writable()
    planned = workflow.plan(root, selection_of(options))
    needs = needs_of(workflow, planned)
    check_needs(needs)
    run = options.run or f"{name}-{planned[-1].key[:6]}"
    asked, traces = options.profile_steps, root.join("runs", run, TRACES).uri
    profiling = None if asked is None else parse_steps(asked, workflow=workflow, folder=traces)
    return Prepared(
        recipe,
        workflow,
        profile,
        root,
        tracking_uri(options.tracking),
        name,
        run,
        planned,
        needs,
        commit(),
        profiling,
    )


def selection_of(options: RunOptions) -> Selection:
    return Selection(tuple(options.only), options.from_, options.until, options.force)


def run(options: RunOptions, console: Console) -> int:
    """Run a recipe to the end; returns the exit code: 0 done, 1 failed, 130 interrupted."""
    prepared = prepare(options)
    started = time.time()
    with announced(prepared.root, prepared.run, prepared.planned):
        if options.name is None:
            check_name(prepared, console)
        for line in changes_of_code(prepared.planned):
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
        shares = _share(prepared, options, console)
    signal.signal(signal.SIGTERM, _interrupt)  # `kill` is Ctrl-C to a run that a shell started with `&`
    actor = _start_recorder(prepared, chosen_name=options.name is not None)
    if not prepared.root.exists(f"runs/{prepared.run}/plan.json"):  # for `cascade report`, and whoever looks for it
        _save(
            prepared, Outcome(), [StageStatus(entry.stage.name, entry.key) for entry in prepared.planned], seconds=0.0
        )
    try:
        outcome = _execute(prepared, options, actor, shares, console)
        statuses = ray.get(actor.snapshot.remote())
        report = _report(prepared, outcome, statuses, actor, seconds=time.time() - started)
        ray.get(actor.emit.remote(_describe_models(prepared, options, outcome)))
        warnings = ray.get(actor.close.remote("FAILED" if outcome.failures else "FINISHED", options.promote))
        promotion, pages = ray.get([actor.promotion.remote(), actor.pages.remote()])
        if pages and report != "none":
            with suppress(StoreError):  # a report without links is there
                link_pages(prepared.root, prepared.run, pages)
    except KeyboardInterrupt:
        ray.get(actor.close.remote("KILLED"))
        console.print(
            f"interrupted; nothing that was finished is lost. Run the same command again to go on ({prepared.run})",
            soft_wrap=True,
        )
        return INTERRUPTED
    finally:
        ray.shutdown()
    console.print(run_tables(statuses))
    return _conclude(prepared, outcome, warnings, promotion, report, time.time() - started, console)


def parse_steps(text: str, *, workflow: Workflow, folder: str) -> Profiling:
    """Parses `--profile-steps 20:25`, the steps of each training that torch.profiler records.

    Raises UsageError, in one line, for steps that no training of the workflow takes.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--profile-steps {text}: write it as FIRST:LAST, 20:25 for steps 20 to 25; the first is 1")
    if last - first >= MOST_STEPS:
        raise UsageError(f"--profile-steps {text}: at most {MOST_STEPS} steps, a trace grows with each")
    steps = {name: config.optimization.total_steps for name, config in trainings(workflow).items()}
    if max(steps.values(), default=0) < first:
        taken = ", ".join(f"{name} {number}" for name, number in steps.items()) or "there is none"
        raise UsageError(f"--profile-steps {text}: no training takes step {first} (steps: {taken})")
    return Profiling(first_step=first, last_step=last, folder=folder)


def check_name(prepared: Prepared, console: Console) -> None:
    """Raise UsageError, in one line, if models of the run's name learned from other images."""
    if prepared.tracking is None:
        return
    from components.runtime.tracking.promotion import find_clash  # MLflow takes seconds to import

    set_environment(environment())
    stages = [stage.name for stage in prepared.workflow.stages]
    data = data_identity(prepared.recipe.images.source)
    try:
        clash = find_clash(prepared.name, stages, data, tracking_uri=prepared.tracking)
    except Exception:  # a database or a network may raise anything
        line = f"MLflow is away: when it is back it is seen whether {prepared.name} names models of other images"
        console.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True)
        return
    if clash is not None:
        raise UsageError(clash)


def _share(prepared: Prepared, options: RunOptions, console: Console) -> dict[str, Resources]:
    """Start or join Ray, and share its resources among the stages to run. Raises UsageError."""
    future = None if options.cluster is None else parse_cluster(options.cluster)
    if future is not None and not on_cluster():
        raise UsageError(
            "--cluster says what a cluster will have, and none is joined here; `cascade plan` takes it too"
        )
    space = space_of(prepared.workflow, prepared.planned)
    space.check(root=prepared.root, works=not on_cluster())
    present = start_ray(worker_start_timeout=prepared.profile.start_timeout, verbose=options.verbose)
    cluster, running = future or present, [entry.stage.name for entry in prepared.planned if entry.wanted]
    shares = share_cluster(prepared.workflow, prepared.profile, cluster, running=running)
    check_batches(prepared.workflow, shares)
    check_sharding(prepared.workflow, shares)
    if on_cluster():
        check_nodes(prepared.needs, prepared.root, space)
    if cluster.gpus and shares:
        console.print(resource_table(prepared.workflow, prepared.profile, cluster, shares))
    return shares


def _start_recorder(prepared: Prepared, *, chosen_name: bool) -> Any:
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    remote = ray.remote(num_cpus=0, scheduling_strategy=here)(RunRecorder)
    actor = remote.remote(tracking=prepared.tracking, spool=absolute("runs/spool"))
    tags = {
        "name": prepared.name,
        "recipe": prepared.recipe.name,
        "git_commit": prepared.commit,
        "storage": prepared.root.uri,
        "report": prepared.root.url(f"runs/{prepared.run}/{REPORT}"),
        "data": data_identity(prepared.recipe.images.source),
        **({"chosen_name": "true"} if chosen_name else {}),
    }
    parameters = prepared.recipe.model_dump(mode="json")
    started = events.RunStarted(prepared.run, resolved_yaml(prepared.recipe), parameters, tags)
    ray.get(actor.emit.remote(started))
    return actor


def _execute(
    prepared: Prepared, options: RunOptions, actor: Any, shares: dict[str, Resources], console: Console
) -> Outcome:
    def resources(stage: str) -> Resources:
        share = shares.get(stage, Resources())  # of what is cached nobody asks more
        return share.model_copy(update={"profiling": prepared.profiling})

    with Display(console) as show:
        return execute(
            prepared.planned,
            actor=actor,
            resources=resources,
            provenance={"git_commit": prepared.commit, "run": prepared.run},
            force=options.force,
            show=show,
        )


def _report(prepared: Prepared, outcome: Outcome, statuses: list[StageStatus], actor: Any, *, seconds: float) -> str:
    """Save the run and draw the report; returns the URL.

    A full storage is a failure of the run, beside failures of its stages.
    """
    try:
        _save(prepared, outcome, statuses, seconds=seconds)
        url, html = render_run(prepared.root, prepared.run)
    except StoreError as error:
        outcome.failures["report"] = str(error)
        return "none"
    ray.get(actor.emit.remote(events.Text("", "report.html", html)))
    return url


def _describe_models(prepared: Prepared, options: RunOptions, outcome: Outcome) -> events.ModelsDescribed:
    command = ["cascade", "run", "--recipe", options.recipe]
    command += [part for assignment in options.set for part in ("--set", assignment)]
    command += ["--name", options.name] if options.name else []
    about, details = model_card(
        outcome.artifacts,
        recipe=prepared.recipe.name,
        run=prepared.run,
        report=prepared.root.url(f"runs/{prepared.run}/{REPORT}"),
        command=command,
        commit=prepared.commit,
    )
    return events.ModelsDescribed(about, details)


def _save(prepared: Prepared, outcome: Outcome, statuses: list[StageStatus], *, seconds: float) -> None:
    amounts = ray.cluster_resources().items()
    counted = ", ".join(f"{amount:g} {kind}" for kind, amount in amounts if kind in ("CPU", "GPU"))
    facts = {"models": registered_name(prepared.name)} if prepared.tracking else {}
    facts |= {
        "recipe": prepared.recipe.name,
        "code": code_line(prepared.commit),
        "machine": f"{os.cpu_count()} cores; Ray counts {counted}",
        "storage": prepared.root.uri,
        "tracking": re.sub(r"//[^/@]+@", "//", prepared.tracking or "none"),  # an address may carry a password
    }
    save_run(
        prepared.root,
        prepared.run,
        recipe_yaml=resolved_yaml(prepared.recipe),
        planned=prepared.planned,
        statuses=statuses,
        outcome=outcome,
        facts=facts,
        seconds=seconds,
    )


def _conclude(
    prepared: Prepared,
    outcome: Outcome,
    warnings: list[str],
    promotion: list[str] | None,
    report: str,
    seconds: float,
    console: Console,
) -> int:
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    for stage, message in outcome.failures.items():
        console.print(f"failed: {stage}: {message}", style="red", highlight=False, soft_wrap=True)
    if outcome.failures:
        console.print(
            f"details: {prepared.root.url(f'runs/{prepared.run}/errors.txt')}; the same command goes on from here"
        )
    if prepared.profiling is not None:
        for line in traces_of(prepared.root, prepared.run) or ["none, no training that ran took these steps"]:
            console.print(f"trace: {line}", highlight=False, soft_wrap=True)
    console.print(f"code: {code_line(prepared.commit)}", highlight=False, soft_wrap=True)
    console.print(f"report: {report} ({duration(seconds)})", highlight=False, soft_wrap=True)
    if prepared.tracking and "cascade" in outcome.artifacts and not outcome.failures and promotion is None:
        promotion = [f"model: {registered_name(prepared.name)}, which becomes champion or not when MLflow is back"]
    for line in promotion or []:
        console.print(line, highlight=False, soft_wrap=True)
    return FAILED if outcome.failures else DONE


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
