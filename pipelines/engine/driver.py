"""A run from the command line to the report: check, plan, execute, publish, render."""

import hashlib
import logging
import os
import re
import shlex
import signal
import time
import uuid
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import ray
from rich.console import Console

from components.configuration.file_names import folder_name
from components.configuration.usage import UsageError, usage_errors
from components.data.source_check import check_outside, detect_source
from components.data.source_look import SourceLook, look_at
from components.evaluation.grids import labelled_grid
from components.runtime import events
from components.runtime.execution import Profiling, Resources
from components.runtime.storage import outages
from components.runtime.storage.artifact import ArtifactError
from components.runtime.storage.connection import shown
from components.runtime.storage.store import Store, StoreError, absolute
from components.runtime.tracking.event_log import journal_name
from components.runtime.tracking.names import environment, registered_name
from components.stages.images import ImagesConfig
from pipelines.engine import run_report
from pipelines.engine.code_seen import changes_of_code
from pipelines.engine.display import Display, duration, run_tables, say
from pipelines.engine.execute import Outcome, execute
from pipelines.engine.naming import cascade_name, data_identity, model_card, resolve_starts
from pipelines.engine.provenance import code_line, commit
from pipelines.engine.recorder import ActorRecorder, Closing, RunRecorder, StageStatus
from pipelines.engine.session import JOB_VARIABLE, on_cluster, set_environment, start_ray, this_node
from pipelines.planning import preflight
from pipelines.planning.profiles import Profile, load_profile, parse_cluster, storage_uri, tracking_uri
from pipelines.planning.shares import resource_table, share_cluster, trainings
from pipelines.recipes.catalog import DEMO, RECIPES, load_recipe, resolved_yaml
from pipelines.recipes.shapes import Recipe
from pipelines.workflow import PlannedStage, Selection, Workflow
from pipelines.workflows import build_workflow

logger = logging.getLogger("cascade")
DONE, FAILED, UNREGISTERED, INTERRUPTED = 0, 1, 3, 130
NICENESS = "RAY_worker_niceness"  # Ray's own setting, 15 where it is not set
MOST_STEPS = 100  # under the profiler: each leaves some MB


@dataclass(frozen=True)
class RunOptions(Selection):
    """Options of `cascade run`."""

    recipe: str = DEMO
    set: list[str] = field(default_factory=list)
    storage: str | None = None
    tracking: str | None = None
    profile: str = "auto"
    name: str | None = None
    run: str | None = None
    verbose: bool = False
    profile_steps: str | None = None  # of each training, recorded by torch.profiler, as 20:25
    cluster: str | None = None  # what a cluster will have, as gpus=8,cpus=64
    fastest: bool | None = None  # or the cheapest; None: the profile's aim
    promote: events.Promote = "better"

    @property
    def again(self) -> str:
        """The command that goes on with an unfinished run: with `--force` it would begin once more."""
        return "the same command without --force" if self.force else "the same command"


@dataclass(frozen=True)
class Prepared:
    """All facts of a run before anything starts."""

    options: RunOptions
    recipe: Recipe
    workflow: Workflow
    profile: Profile
    root: Store
    tracking: str | None
    name: str  # of the models, in MLflow's registry
    run: str
    planned: list[PlannedStage]
    needs: preflight.Needs
    commit: str  # of the code, as `provenance.commit` has it
    starts: list[str]  # a line for each training that begins with given weights
    look: SourceLook | None  # at the user's images, where they are ingested
    profiling: Profiling | None = None

    @property
    def running(self) -> list[str]:
        """Names of the stages to run."""
        return [entry.stage.name for entry in self.planned if entry.wanted]

    @property
    def seen(self) -> list[str]:
        """Lines about the user's images, and the name of the models that learn from them."""
        return [] if self.look is None else [*self.look.lines, f"models: {registered_name(self.name)}"]

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the run in MLflow; a name that the user chose is taken over from other images."""
        tags = {
            "name": self.name,
            "recipe": self.recipe.name,
            "git_commit": self.commit,
            "storage": self.root.uri,
            "report": self.url(run_report.REPORT),
            "data": data_identity(self.recipe.images.source),
        }
        return tags | ({} if self.options.name is None else {"chosen_name": "true"})

    def url(self, file: str) -> str:
        """Address of a file of the run."""
        return self.root.url(f"runs/{self.run}/{file}")


def prepare(options: RunOptions) -> Prepared:
    """Load and check recipe, profile, storage and source, and plan.
    Raises UsageError, StoreError or SourceError, each one line, before anything starts."""
    recipe = load_recipe(options.recipe, options.set)
    profile = load_profile(options.profile, fastest=options.fastest)
    name, root = cascade_name(recipe, options.name), Store(storage_uri(options.storage))
    workflow, tracking = build_workflow(recipe), tracking_uri(options.tracking)
    named = resolve_starts(workflow, tracking)
    root.check_writable()
    planned = workflow.plan(root, options)
    needs = preflight.needs_of(workflow, planned)
    preflight.check_needs(needs)
    starts, configs = [*named, *preflight.check_starts(planned)], [e.stage.config for e in planned if e.wanted]
    look = next((_look(own, root) for own in configs if isinstance(own, ImagesConfig)), None)
    with usage_errors("--run: "):
        keys = hashlib.sha256("".join(entry.key for entry in planned).encode()).hexdigest()
        again = f"-{uuid.uuid4().hex[:6]}" if options.force else ""  # its curves are others
        run = folder_name(options.run or f"{name}-{keys[:6]}{again}")
    run_report.check_same_run(root, run, planned)
    profiling = None
    if options.profile_steps is not None:
        folder = root.join("runs", run, run_report.TRACES).uri
        profiling = parse_steps(options.profile_steps, workflow=workflow, folder=folder)
    facts = (root, tracking, name, run, planned, needs, commit(), starts, look, profiling)
    return Prepared(options, recipe, workflow, profile, *facts)


def _look(images: ImagesConfig, root: Store) -> SourceLook | None:
    source, path = detect_source(images.source)
    if path is not None:
        check_outside(root.uri, images.source, option="--storage")
    return look_at(source, path, images)


def run(options: RunOptions, console: Console) -> int:
    """Run a recipe to the end; returns the exit code.
    0: done, 1: failed, 3: done, but MLflow lacks a part, 130: interrupted.
    A submitted job waits for storage from its first look on, as nobody would start it again; what a person starts, once
    storage was seen. Raises as `prepare`."""
    patience = {outages.SETTING: outages.RUN_SECONDS}
    if JOB_VARIABLE in os.environ:
        set_environment(patience)
    outages.patience()  # a wrong setting is refused before anything starts
    prepared, started = prepare(options), time.time()
    set_environment(patience)
    with run_report.announced(prepared.root, prepared.run, prepared.planned):
        for line in prepared.seen:
            say(console, line)
        if options.name is None:
            check_name(prepared, console)
        for line in (*prepared.profile.unused(prepared.workflow.by_name), *changes_of_code(prepared.planned)):
            say(console, line, "yellow")
        shares = _share(prepared, console)
    if prepared.look is None and options.recipe in RECIPES:
        say(console, RECIPES[options.recipe].summary)
    if prepared.look is not None and prepared.look.images:
        grid = labelled_grid(prepared.look.images, prepared.look.captions)
        prepared.root.write(f"runs/{prepared.run}/{run_report.SOURCE_IMAGES}", grid)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is Ctrl-C in the background too
    recorder = _start_recorder(prepared)
    waiting = [StageStatus(entry.stage.name) for entry in prepared.planned]
    if not prepared.root.exists(f"runs/{prepared.run}/plan.json"):  # for `cascade report`
        _save(prepared, Outcome(), waiting, seconds=0.0)
    try:
        origin, force = {"git_commit": prepared.commit, "run": prepared.run}, options.force
        with Display(console) as show:
            outcome = execute(
                prepared.planned, recorder=recorder, shares=shares, provenance=origin, force=force, show=show
            )
        statuses = recorder.snapshot(waiting)
        report = _report(prepared, outcome, statuses, recorder, seconds=time.time() - started)
        recorder.emit(_describe_models(prepared, outcome), wait=True)
        closing = recorder.close("FAILED" if outcome.failures else "FINISHED", options.promote)
        if closing.pages and report != "none":
            with suppress(StoreError):  # a report without links is there
                run_report.link_pages(prepared.root, prepared.run, closing.pages)
    except KeyboardInterrupt:
        recorder.close("KILLED")
        say(console, f"interrupted; nothing that was finished is lost: {options.again} goes on ({prepared.run})")
        return INTERRUPTED
    finally:
        ray.shutdown()
    console.print(run_tables(statuses))
    for warning in closing.warnings:
        say(console, f"warning: {warning}", "yellow")
    report = f"{report} ({duration(time.time() - started)})"
    return _conclude(prepared, outcome, closing, report, console)


def parse_steps(text: str, *, workflow: Workflow, folder: str) -> Profiling:
    """Parses `--profile-steps 20:25`, the steps of each training that torch.profiler records.
    Raises UsageError, in one line, for steps that no training of the workflow takes."""
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
        say(console, f"warning: {line}", "yellow")
        return
    if clash is not None:
        raise UsageError(clash)


def _share(prepared: Prepared, console: Console) -> dict[str, Resources]:
    """Start or join Ray, and share its resources among the stages to run. Raises UsageError."""
    options, workflow, profile = prepared.options, prepared.workflow, prepared.profile
    future = None if options.cluster is None else parse_cluster(options.cluster)
    if future is not None and not on_cluster():
        says = "--cluster says what a cluster will have, and none is joined here"
        raise UsageError(f"{says}; `cascade plan` takes it too")
    space = preflight.space_of(workflow, prepared.planned)
    space.check(root=prepared.root, works=not on_cluster())
    # A cold GPU node pulls the image first. Elastic trainings take what there is; but where a node is lost, Ray waits
    # so long before it looks again.
    seconds = profile.worker_start_timeout or (600 if profile.min_workers is None else 30)
    present = start_ray(worker_start_timeout=seconds, verbose=options.verbose)
    if prepared.running and not on_cluster() and (nice := os.environ.get(NICENESS, "15")) != "0":
        say(console, f"workers run at nice {nice}, behind other programs here; {NICENESS}=0 gives them an equal share")
    cluster = present if future is None else future._replace(gpu=future.gpu or present.gpu)
    shares = share_cluster(workflow, profile, cluster, running=prepared.running)
    preflight.check_shares(workflow, shares)
    if on_cluster():
        preflight.check_nodes(prepared.needs, prepared.root, space)
    if cluster.gpus and shares:
        console.print(resource_table(workflow, profile, cluster, shares))
    return {name: share.model_copy(update={"profiling": prepared.profiling}) for name, share in shares.items()}


def _start_recorder(prepared: Prepared) -> ActorRecorder:
    parameters = prepared.recipe.model_dump(mode="json")
    begun = events.RunStarted(prepared.run, resolved_yaml(prepared.recipe), parameters, prepared.tags)
    body = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=this_node())(RunRecorder)
    spool, journal = absolute("runs/spool"), journal_name()
    actor = body.options(name=outages.RECORDER).remote(
        tracking=prepared.tracking, spool=spool, journal=journal, begun=begun
    )
    try:
        ray.get(actor.snapshot.remote())
    except ray.exceptions.RayError as error:
        raise UsageError(f"the run's recorder can't start: {str(error).strip().splitlines()[-1]}") from error
    return ActorRecorder(actor)


def _report(
    prepared: Prepared, outcome: Outcome, statuses: list[StageStatus], recorder: ActorRecorder, *, seconds: float
) -> str:
    """Save the run and draw the report; returns the URL. Full storage and damage fail the run.
    Storage that a stage has waited for in vain is asked once."""
    in_vain = any(outages.GONE in line for line in outcome.failures.values())
    try:
        with outages.hurried() if in_vain else nullcontext():
            _save(prepared, outcome, statuses, seconds=seconds)
            url, html = run_report.render_run(prepared.root, prepared.run)
    except (ArtifactError, StoreError) as error:
        outcome.failures["report"] = str(error)
        return "none"
    recorder.emit(events.Text("", "report.html", html), wait=True)
    return url


def _describe_models(prepared: Prepared, outcome: Outcome) -> events.ModelsDescribed:
    options = prepared.options
    command = ["cascade", "run", "--recipe", options.recipe]
    command += [part for assignment in options.set for part in ("--set", assignment)]
    command += ["--name", options.name] if options.name else []
    facts = {"recipe": prepared.recipe.name, "run": prepared.run, "report": prepared.url(run_report.REPORT)}
    return events.ModelsDescribed(*model_card(outcome.artifacts, **facts, command=command, commit=prepared.commit))


def _save(prepared: Prepared, outcome: Outcome, statuses: list[StageStatus], *, seconds: float) -> None:
    amounts = ray.cluster_resources().items()
    counted = ", ".join(f"{amount:g} {kind}" for kind, amount in amounts if kind in ("CPU", "GPU"))
    facts = {"models": registered_name(prepared.name)} if prepared.tracking else {}
    facts |= {
        "recipe": prepared.recipe.name,
        "code": code_line(prepared.commit),
        "machine": f"{os.cpu_count()} cores; Ray counts {counted}",
        "storage": prepared.root.uri,
        "tracking": shown(prepared.tracking or "none"),
    }
    folder, yaml = prepared.root.join("runs", prepared.run), resolved_yaml(prepared.recipe)
    run_report.save_run(folder, yaml, prepared.planned, statuses, outcome, facts=facts, seconds=seconds)


def _conclude(prepared: Prepared, outcome: Outcome, closing: Closing, report: str, console: Console) -> int:
    """Print failures, traces, code, report, promotion, and what is not in MLflow; returns the exit code."""
    for stage, message in outcome.failures.items():
        say(console, f"failed: {stage}: {message}", "red")
    if outcome.failures:
        say(console, f"details: {prepared.url('errors.txt')}; {prepared.options.again} goes on from here")
    if prepared.profiling is not None:
        traces = run_report.traces_of(prepared.root, prepared.run)
        for line in traces or ["none, no training that ran took these steps"]:
            say(console, f"trace: {line}")
    say(console, f"code: {code_line(prepared.commit)}")
    say(console, f"report: {report}")
    for line in closing.promotion:
        say(console, line)
    if closing.undelivered:
        what = ", ".join(closing.unregistered) or "a part of the run, after which its models may be champions"
        say(console, f"not registered: {what}", "red")
        place = {"--storage": prepared.root.uri, "--tracking": shown(str(prepared.tracking))}
        where = shlex.join([prepared.run, *(word for pair in place.items() for word in pair)])
        say(console, f"to register, once MLflow is back: cascade register {where}")
    lacking = closing.undelivered or closing.lost or (closing.silent and prepared.tracking is not None)
    return FAILED if outcome.failures else UNREGISTERED if lacking else DONE
