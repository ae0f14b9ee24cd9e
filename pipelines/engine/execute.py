"""Runs a planned workflow: a Ray task for each stage, artifacts as object references."""

import logging
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.configuration.config import Config
from components.runtime import events
from components.runtime.execution import Resources
from components.runtime.pool import one_line
from components.runtime.storage.artifact import (
    FORCED,
    Artifact,
    begin_forced_try,
    current_try,
    has_committed,
    load_artifact,
)
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import SCRATCH, Store
from components.stages.context import StageContext
from pipelines.engine.code_seen import code_of
from pipelines.engine.recorder import ActorRecorder, StageStatus
from pipelines.workflow import PlannedStage

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
WAIT_WARNING_SECONDS = 45.0


@dataclass(frozen=True)
class StageJob:
    """Arguments of a stage's task besides the input artifacts."""

    name: str
    key: str
    run: Callable[..., Artifact]
    config: Config
    inputs: dict[str, int | None]  # input name -> how many artifacts it takes; None: one, not in a list
    input_keys: dict[str, str]
    store: Store
    resources: Resources
    provenance: dict[str, Any]
    forced: str  # id of this run's forced tries: the stage is made anew though it may be committed; "": it is not


@dataclass
class Outcome:
    """Artifacts and failures of a run."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # stage -> one line
    tracebacks: dict[str, str] = field(default_factory=dict)


def execute(
    planned: list[PlannedStage],
    *,
    actor: Any,
    resources: Callable[[str], Resources],
    provenance: dict[str, Any],
    force: bool,
    show: Callable[[list[StageStatus]], None],
) -> Outcome:
    """Run the wanted stages, in parallel where graph and cluster allow, and wait for all stages.

    A stage that fails stops what needs it, and nothing else.
    """
    references: dict[str, Any] = {}
    jobs: dict[Any, PlannedStage] = {}
    forced = uuid.uuid4().hex[:12] if force else ""
    outcome = Outcome()
    # A task stays on the driver's node (Train's controller lives there) and holds no CPU while it waits.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote_stage = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=here)(run_stage)
    for entry in planned:
        ray.get(actor.emit.remote(events.StagePlanned(entry.stage.name, entry.key)))
        if not entry.wanted:
            if entry.cached is None:
                ray.get(actor.emit.remote(events.StageHeld(entry.stage.name, "skipped", "not selected")))
                continue
            outcome.artifacts[entry.stage.name] = entry.cached
            references[entry.stage.name] = ray.put(entry.cached)
            actor.emit.remote(events.StageCached(entry.stage.name, entry.cached))
            continue
        job = _job(entry, resources(entry.stage.name), provenance, forced)
        arguments = [references[parent.name] for parent in entry.stage.parents()]
        reference = remote_stage.remote(job, ActorRecorder(actor), *arguments)
        references[entry.stage.name] = reference
        jobs[reference] = entry
    show(ray.get(actor.snapshot.remote()))
    try:
        _wait(jobs, outcome, actor, resources, show)
    except BaseException:
        for reference in jobs:
            ray.cancel(reference, force=True)
        raise
    return outcome


def _job(entry: PlannedStage, resources: Resources, provenance: dict[str, Any], forced: str) -> StageJob:
    stage = entry.stage
    counts = {name: len(upstream) if isinstance(upstream, list) else None for name, upstream in stage.inputs.items()}
    return StageJob(
        name=stage.name,
        key=entry.key,
        run=stage.run,
        config=stage.config,
        inputs=counts,
        input_keys=entry.input_keys,
        store=entry.store,
        resources=resources,
        provenance={**provenance, "config": stage.config.model_dump(mode="json"), "code": code_of(stage)},
        forced=forced,
    )


def run_stage(job: StageJob, recorder: ActorRecorder, *artifacts: Artifact) -> Artifact:
    """Body of a stage's task: hold the lease, run, commit; or adopt the artifact of another driver."""
    inputs = _group(job.inputs, list(artifacts))
    lease = Lease(job.store.join("lease"), on_lost=_die)

    def is_done() -> bool:
        return has_committed(job.store, job.forced)

    def on_wait(reason: str) -> None:
        recorder.emit(events.StageHeld(job.name, "queued", f"waiting: {reason}"))

    if not lease.acquire(is_done=is_done, on_wait=on_wait):
        return _adopt(job, recorder)
    try:
        if is_done():
            return _adopt(job, recorder)
        if job.forced:
            begin_forced_try(job.store, job.forced)
        flat = {f"{name}{'' if count is None else f'.{i}'}": a for name, count, i, a in _flat(job.inputs, artifacts)}
        config = job.config.model_dump(mode="json")
        ray.get(recorder.actor.emit.remote(events.StageStarted(job.name, job.key, config, flat, job.store.uri)))
        started = time.time()
        provenance = {**job.provenance, "started": started, **({FORCED: job.forced} if job.forced else {})}
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{job.name}-") as scratch:
            context = StageContext(
                stage=job.name,
                key=job.key,
                store=job.store,
                resources=job.resources,
                recorder=recorder,
                inputs=job.input_keys,
                provenance=provenance,
                scratch_folder=Path(scratch),
                forced=current_try(job.store),
            )
            artifact = job.run(job.config, context, **inputs)
        ray.get(recorder.actor.emit.remote(events.StageEnded(job.name, "FINISHED", artifact)))
        return artifact
    except Exception as error:
        ray.get(recorder.actor.emit.remote(events.StageEnded(job.name, "FAILED", error=one_line(error))))
        raise
    finally:
        lease.release()


def _adopt(job: StageJob, recorder: ActorRecorder) -> Artifact:
    artifact = load_artifact(job.store)
    assert artifact is not None
    recorder.emit(events.StageCached(job.name, artifact))
    return artifact


def _die() -> None:
    """End this process at once, because another process holds the lease; Ray starts the task again.

    Two must not write.
    """
    logger.error("another driver took over this stage; giving way")
    os._exit(1)


def _group(counts: dict[str, int | None], artifacts: list[Artifact]) -> dict[str, Artifact | list[Artifact]]:
    grouped: dict[str, Artifact | list[Artifact]] = {}
    for name, count in counts.items():
        grouped[name] = artifacts.pop(0) if count is None else [artifacts.pop(0) for _ in range(count)]
    return grouped


def _flat(
    counts: dict[str, int | None], artifacts: tuple[Artifact, ...]
) -> list[tuple[str, int | None, int, Artifact]]:
    rows, rest = [], iter(artifacts)
    for name, count in counts.items():
        rows += [(name, count, i, next(rest)) for i in range(1 if count is None else count)]
    return rows


def _wait(
    jobs: dict[Any, PlannedStage],
    outcome: Outcome,
    actor: Any,
    resources: Callable[[str], Resources],
    show: Callable[[list[StageStatus]], None],
) -> None:
    waiting = list(jobs)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS, fetch_local=False)
        for reference in ready:
            _collect(jobs[reference], reference, outcome, actor)
        statuses = ray.get(actor.snapshot.remote())
        for status in statuses:
            status.note = _starved(status, resources(status.name)) or status.note
        show(statuses)


def _collect(entry: PlannedStage, reference: Any, outcome: Outcome, actor: Any) -> None:
    name = entry.stage.name
    try:
        outcome.artifacts[name] = ray.get(reference)
    except Exception as error:
        failed = [parent.name for parent in entry.stage.parents() if parent.name in outcome.failures]
        if failed:
            outcome.failures[name] = f"not run: {', '.join(failed)} failed"
            ray.get(actor.emit.remote(events.StageHeld(name, "skipped", outcome.failures[name])))
        else:
            outcome.failures[name] = one_line(error)
            outcome.tracebacks[name] = "".join(traceback.format_exception(error))


def _starved(status: StageStatus, resources: Resources) -> str:
    """Names the missing resources of a stage whose first step is late; empty if the step is not late."""
    slow = status.state == "running" and status.step == 0 and (status.seconds or 0) > WAIT_WARNING_SECONDS
    if not slow:
        return ""
    free, total = ray.available_resources(), ray.cluster_resources()
    needs, workers = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}, resources.num_workers
    least = resources.min_workers or workers  # a gang starts together, or not at all
    short = [
        f"{workers} x {amount:g} {name} (free {free.get(name, 0):g} of {total.get(name, 0):g})"
        for name, amount in needs.items()
        if amount and (free.get(name, 0) < amount or total.get(name, 0) < least * amount)
    ]
    if short:
        return f"waits for {' and '.join(short)}"
    # Elastic trainings reserve room beforehand, which does not count as taken here and outlives a driver's `kill -9`.
    held = ", or Ray keeps the room of a killed run (3 minutes)" if resources.min_workers else ""
    return f"starting slowly: the machine is busy{held}"
