"""The engine on a real Ray: parallel branches, failures that stop only what needs them, races, starvation."""

import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import ray

from components.configuration.config import Config
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.stages.context import StageContext
from pipelines.engine.execute import Outcome, execute
from pipelines.engine.recorder import ActorRecorder, RunRecorder
from pipelines.planning.profiles import found_cluster, this_machine
from pipelines.workflow import Selection, Stage, Workflow

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Work(Config):
    text: str = ""
    fail: bool = False
    seconds: float = 0.0
    log: str = ""  # a folder in which each run of the stage leaves a file


def work(config: Work, context: StageContext, **inputs: Artifact | list[Artifact]) -> Artifact:
    started = time.time()
    time.sleep(config.seconds)
    if config.fail:
        raise ValueError("broken on purpose")
    folder = context.scratch()
    parents = [item for given in inputs.values() for item in (given if isinstance(given, list) else [given])]
    text = config.text + "".join(parent.read("text").decode() for parent in parents)
    (folder / "text").write_text(text)
    if config.log:
        Store(config.log).write(f"{context.stage}-{time.time_ns()}", b"")
    return context.commit("report", folder=folder, metadata={"span": [started, time.time()], "scratch": str(folder)})


def run(workflow: Workflow, root: str, selection: Selection | None = None) -> tuple[Outcome, Any]:
    selection = selection or Selection()
    actor = ray.remote(num_cpus=0)(RunRecorder).remote()
    outcome = execute(
        workflow.plan(Store(root), selection),
        recorder=ActorRecorder(actor),
        shares=defaultdict(Resources),
        provenance={},
        force=selection.force,
        show=lambda statuses: None,
    )
    return outcome, {status.name: status.state for status in ray.get(actor.snapshot.remote())}


def test_the_ray_of_this_machine_says_how_many_of_its_cpus_stand_for_a_core():
    cores = os.cpu_count() or 1
    logical = 4 * max(2, cores)
    assert found_cluster(here=True).cpus == this_machine().cpus == logical
    assert found_cluster(here=False).cpus_per_core == logical // cores


def test_artifacts_flow_along_the_graph_and_a_second_run_is_all_cached(tmp_path: Path):
    first = Stage("first", work, Work(text="a"))
    sides = [Stage("left", work, Work(text="b"), first=first), Stage("right", work, Work(text="c"), first=first)]
    workflow = Workflow("w", [first, *sides, Stage("end", work, Work(text="d"), sides=sides, first=first)])
    outcome, states = run(workflow, str(tmp_path))
    assert outcome.failures == {}
    assert outcome.artifacts["end"].read("text") == b"dbacaa"
    for scratch in (Path(artifact.metadata["scratch"]) for artifact in outcome.artifacts.values()):
        assert scratch.parent != Path(tempfile.gettempdir())
        assert not scratch.parent.exists(), "the stage's own is left"
    assert set(states.values()) == {"done"}
    again, states = run(workflow, str(tmp_path))
    assert again.artifacts == outcome.artifacts
    assert set(states.values()) == {"cached"}


def test_branches_run_at_the_same_time(tmp_path: Path):
    branches = [Stage(name, work, Work(text=name, seconds=4)) for name in ("one", "two", "three")]
    outcome, _ = run(Workflow("w", branches), str(tmp_path))
    spans = [artifact.metadata["span"] for artifact in outcome.artifacts.values()]
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path: Path):
    bad = Stage("bad", work, Work(fail=True))
    workflow = Workflow("w", [bad, Stage("after", work, Work(), bad=bad), Stage("other", work, Work())])
    outcome, states = run(workflow, str(tmp_path))
    assert outcome.failures == {"bad": "ValueError: broken on purpose", "after": "not run: bad failed"}
    assert states == {"bad": "failed", "after": "skipped", "other": "done"}


def test_forcing_a_stage_runs_it_again_and_leaves_its_old_files(tmp_path: Path):
    workflow = Workflow("w", [Stage("one", work, Work(text="a", log=str(tmp_path / "log")))])
    first, _ = run(workflow, str(tmp_path / "root"))
    second, _ = run(workflow, str(tmp_path / "root"), Selection(force=True))
    assert len(Store(str(tmp_path / "log")).list()) == 2
    assert first.artifacts["one"].files != second.artifacts["one"].files
    assert first.artifacts["one"].read("text") == b"a"


def dying(config: Work, context: StageContext) -> Artifact:
    """Says what it finds of an earlier try, leaves a file, and dies if it found none."""
    found = [info.path for store in (context.files_store, context.work_store) for info in store.list()]
    Store(config.log).write(f"{time.time_ns()}", ",".join(found).encode())
    context.files_store.write("part", b"part")
    if not found:
        os._exit(1)
    return context.commit("shards", written=["part"])


def test_a_forced_try_that_dies_is_gone_on_with_and_finds_nothing_of_the_ones_before(tmp_path: Path):
    workflow, log = Workflow("w", [Stage("one", dying, Work(log=str(tmp_path / "log")))]), Store(str(tmp_path / "log"))
    for force in (False, False, True, True):
        outcome, _ = run(workflow, str(tmp_path / "root"), Selection(force=force))
        assert outcome.artifacts["one"].names() == ["part"]
    assert [log.read(info.path).decode() for info in log.list()] == ["", "part"] * 3


def killed(config: Work, context: StageContext) -> Artifact:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_stage_whose_process_is_killed_for_good_has_failed_in_the_table_too(tmp_path: Path):
    outcome, states = run(Workflow("w", [Stage("one", killed, Work())]), str(tmp_path))
    assert "worker died" in outcome.failures["one"] or "died" in outcome.failures["one"]
    assert states == {"one": "failed"}


def test_two_drivers_on_one_storage_run_each_stage_once(tmp_path: Path):
    workflow = Workflow("w", [Stage("one", work, Work(text="a", seconds=3, log=str(tmp_path / "log")))])
    outcomes = []
    drivers = [
        threading.Thread(target=lambda: outcomes.append(run(workflow, str(tmp_path / "root"))[0])) for _ in range(2)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert len(Store(str(tmp_path / "log")).list()) == 1
    assert outcomes[0].artifacts == outcomes[1].artifacts
