"""Runs a planned workflow: a Ray task for each stage, artifacts as object references."""

import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

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
from components.runtime.storage.lease import TTL, Lease
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, StoreError
from components.stages.context import StageContext
from pipelines.engine.code_seen import code_of
from pipelines.engine.recorder import STARTING, ActorRecorder, StageStatus
from pipelines.engine.session import memory_line, this_node
from pipelines.workflow import PlannedStage, Stage

POLL_SECONDS = 1.0
WAIT_WARNING_SECONDS = 45.0


@dataclass(frozen=True)
class StageJob:
    """Arguments of a stage's task besides the input artifacts."""

    name: str
    key: str
    run: Callable[..., Artifact]  # of context and inputs
    inputs: dict[str, bool]  # in the graph's order; True: a list, sent as `upsamplers.0`, …
    input_keys: dict[str, str]
    store: Store
    resources: Resources
    provenance: dict[str, Any]
    forced: str  # id of the run that forces it; "": none


@dataclass
class Outcome:
    """Artifacts and failures of a run."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # stage -> one line
    tracebacks: dict[str, str] = field(default_factory=dict)


def execute(
    planned: list[PlannedStage],
    *,
    recorder: ActorRecorder,
    shares: Mapping[str, Resources],
    provenance: dict[str, Any],
    force: bool,
    show: Callable[[list[StageStatus]], None],
) -> Outcome:
    """Run the wanted stages, in parallel where graph and cluster allow, and wait for all stages.
    A stage that fails stops what needs it, and nothing else."""
    references: dict[str, Any] = {}
    jobs: dict[Any, Stage] = {}
    forced, outcome = uuid.uuid4().hex[:12] if force else "", Outcome()
    # A task stays on the driver's node (Train's controller lives there) and holds no CPU while it waits.
    remote_stage = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=this_node())(run_stage)
    for entry in planned:
        stage, name = entry.stage, entry.stage.name
        if entry.wanted:
            recorder.emit(events.StageHeld(name, "waiting"), wait=True)  # before its task can say more
            job = StageJob(
                name=name,
                key=entry.key,
                run=partial(stage.run, stage.config),
                inputs={part: isinstance(own, list) for part, own in stage.inputs.items()},
                input_keys=entry.input_keys,
                store=entry.store,
                resources=shares[name],
                provenance={**provenance, "config": stage.config.model_dump(mode="json"), "code": code_of(stage)},
                forced=forced,
            )
            inputs = {part: references[parent.name] for part, parent in stage.parents.items()}
            references[name] = remote_stage.remote(job, recorder, **inputs)
            jobs[references[name]] = stage
        elif entry.cached is None:
            recorder.emit(events.StageHeld(name, "skipped", "not selected"))
        else:
            outcome.artifacts[name], references[name] = entry.cached, ray.put(entry.cached)
            recorder.emit(events.StageCached(name, entry.cached))
    show(recorder.snapshot([]))
    try:
        _wait(jobs, outcome, recorder, shares, show)
    except BaseException:
        for reference in jobs:
            ray.cancel(reference, force=True)
        raise
    return outcome


def run_stage(job: StageJob, recorder: ActorRecorder, **artifacts: Artifact) -> Artifact:
    """Body of a stage's task: hold the lease, run, commit; or adopt the artifact of another driver."""
    inputs = {
        name: [own for part, own in artifacts.items() if part.startswith(f"{name}.")] if several else artifacts[name]
        for name, several in job.inputs.items()
    }
    lease = Lease(job.store.join("lease"), on_lost=partial(_die, job.name, recorder))
    is_done = partial(has_committed, job.store, job.forced)

    def on_wait(reason: str) -> None:
        recorder.emit(events.StageHeld(job.name, "queued", f"waiting: {reason}"))

    held = False
    try:
        held = lease.acquire(is_done=is_done, on_wait=on_wait)
        if not held or is_done():
            artifact = load_artifact(job.store)
            assert artifact is not None
            recorder.emit(events.StageCached(job.name, artifact))
            return artifact
        if job.forced:
            begin_forced_try(Store(job.store.uri, lease.fence), job.forced)
        started = events.StageStarted(job.name, job.key, job.provenance["config"], artifacts, job.store.uri)
        recorder.emit(started, wait=True)
        provenance = {**job.provenance, "started": time.time(), **({FORCED: job.forced} if job.forced else {})}
        with scratch_folder(job.name) as scratch:
            context = StageContext(
                stage=job.name,
                key=job.key,
                store=job.store,
                resources=job.resources,
                recorder=recorder,
                inputs=job.input_keys,
                provenance=provenance,
                scratch_folder=scratch,
                forced=current_try(job.store),
                fence=lease.fence,
            )
            artifact = job.run(context, **inputs)
        recorder.emit(events.StageEnded(job.name, "FINISHED", artifact), wait=True)
        return artifact
    except Exception as error:
        if held and lease.is_lost():
            _die(job.name, recorder)
        recorder.emit(events.StageEnded(job.name, "FAILED", error=one_line(error)), wait=True)
        raise
    finally:
        with suppress(StoreError):  # storage is away: the lease runs out; the first cause is shown
            lease.release()


def _die(stage: str, recorder: ActorRecorder) -> None:
    """End this process: two must not write. Ray starts the task again, which waits for the other driver."""
    why = f"this driver stood still for more than {TTL:g} s"
    recorder.emit(events.Warning(stage, f"{why}, another took over; waiting for that one's result"), wait=True)
    os._exit(1)


def _wait(
    jobs: dict[Any, Stage],
    outcome: Outcome,
    recorder: ActorRecorder,
    shares: Mapping[str, Resources],
    show: Callable[[list[StageStatus]], None],
) -> None:
    waiting, statuses = list(jobs), list[StageStatus]()
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS, fetch_local=False)
        for stage, reference in ((jobs[reference], reference) for reference in ready):
            try:
                outcome.artifacts[stage.name] = ray.get(reference)
            except Exception as error:
                if failed := [parent.name for parent in stage.parents.values() if parent.name in outcome.failures]:
                    outcome.failures[stage.name] = f"not run: {', '.join(failed)} failed"
                    recorder.emit(events.StageHeld(stage.name, "skipped", outcome.failures[stage.name]), wait=True)
                else:
                    outcome.failures[stage.name] = memory_line(str(error)) or one_line(error)
                    outcome.tracebacks[stage.name] = "".join(traceback.format_exception(error))
                    if not isinstance(error, ray.exceptions.RayTaskError):  # it was killed, and could not say so
                        ended = events.StageEnded(stage.name, "FAILED", error=outcome.failures[stage.name])
                        recorder.emit(ended, wait=True)
        statuses = recorder.snapshot(statuses)
        for status in statuses:
            status.note = _starved(status, shares.get(status.name, Resources())) or status.note
        show(statuses)


def _starved(status: StageStatus, resources: Resources) -> str:
    """Names the missing resources of a stage whose first step is late; empty if the step is not late."""
    if status.state != "running" or status.step > 0 or (status.seconds or 0) <= WAIT_WARNING_SECONDS:
        return ""
    if status.note not in ("", STARTING):  # such as a store that is waited for
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
