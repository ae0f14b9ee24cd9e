"""Traces of a few steps: those that were asked for, and a training that is the same with and without."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from components.configuration.usage import UsageError
from components.runtime.execution import Profiling
from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import ALONE, Worker
from components.training.reporting import traced
from pipelines.engine.driver import parse_steps
from pipelines.recipes.catalog import load_recipe
from pipelines.workflows import build_workflow
from tests.distributed.recording import FileRecorder
from tests.refusals import one_line
from tests.tiny_training import assert_equal_bits, batches, config_of, make_task, weights_of

CONFIG = config_of("pixelcnn", total_steps=8)


def run(folder: Path, first: int, last: int, *, start_step: int = 0, worker: Worker = ALONE) -> dict[str, Tensor]:
    """Train from `start_step` on, as if steps before it had been taken, with these steps traced; the weights."""
    profiling = Profiling(first_step=first, last_step=last, folder=str(folder / "traces"))
    task, rows = make_task(CONFIG), batches(CONFIG, to_batch, start_step=start_step)
    told: dict[str, Any] = {"worker": worker, "recorder": FileRecorder(folder / "log.jsonl"), "start_step": start_step}
    with traced(rows, profiling, stage="base", **told) as followed:
        fit(task, followed, CONFIG.optimization, start_step=start_step)
    return weights_of(task)


def recorded(folder: Path) -> dict[str, set[str]]:
    """By the name of each trace the steps that are in it."""
    found = {}
    for path in sorted((folder / "traces").glob("*")) if (folder / "traces").exists() else []:
        names = {str(event.get("name", "")) for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert any(name.startswith("aten::") for name in names)
        found[path.name] = {name for name in names if name.startswith("step ")}
    return found


@pytest.mark.parametrize(
    ("first", "last", "start_step", "name", "steps"),
    [
        (3, 5, 0, "base-steps-3-5.json.gz", {"step 3", "step 4", "step 5"}),
        (7, 30, 0, "base-steps-7-8.json.gz", {"step 7", "step 8"}),  # training ends before
        (1, 1, 0, "base-steps-1-1.json.gz", {"step 1"}),
        (2, 6, 4, "base-steps-5-6.json.gz", {"step 5", "step 6"}),  # some were taken by an earlier try
    ],
)
def test_a_trace_holds_the_steps_that_were_asked_for(
    tmp_path: Path, first: int, last: int, start_step: int, name: str, steps: set[str]
) -> None:
    run(tmp_path, first, last, start_step=start_step)
    assert recorded(tmp_path) == {name: steps}
    (said,) = FileRecorder(tmp_path / "log.jsonl").lines("text")
    assert (said["name"], said["content"]) == ("trace.txt", str(tmp_path / "traces" / name))


def test_steps_that_were_taken_before_leave_no_trace_and_neither_do_other_ranks(tmp_path: Path) -> None:
    run(tmp_path, 1, 3, start_step=4)
    run(tmp_path, 1, 3, worker=Worker(rank=1))
    assert recorded(tmp_path) == {}


def test_a_traced_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert_equal_bits(run(tmp_path, 3, 5), run(tmp_path, 100, 100))


def test_a_training_that_fails_keeps_what_was_recorded(tmp_path: Path) -> None:
    told: dict[str, Any] = {"stage": "base", "worker": ALONE, "recorder": FileRecorder(tmp_path / "log.jsonl")}
    profiling = Profiling(first_step=1, last_step=9, folder=str(tmp_path / "traces"))

    def log(step: int, metrics: Any) -> None:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        traced(batches(CONFIG, to_batch), profiling, **told, start_step=0) as followed,
    ):
        fit(make_task(CONFIG), followed, CONFIG.optimization, log=log)
    assert recorded(tmp_path) == {"base-steps-1-1.json.gz": {"step 1"}}


def test_a_storage_that_takes_no_trace_costs_a_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    (tmp_path / "traces").write_text("a file where the folder should be")
    weights = run(tmp_path, 3, 4)
    (warning,) = FileRecorder(tmp_path / "log.jsonl").lines("warning")
    assert warning["line"].startswith("no trace: ")
    (tmp_path / "traces").unlink()
    assert_equal_bits(weights, run(tmp_path, 100, 100))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("25:20", "write it as FIRST:LAST"),
        ("0:3", "the first is 1"),
        ("20", "write it as FIRST:LAST"),
        ("a:b", "write it as FIRST:LAST"),
        ("1:101", "at most 100 steps"),
        ("99999999:99999999", "no training takes step 99999999"),
    ],
)
def test_steps_that_no_training_takes_are_refused_in_one_line(text: str, says: str) -> None:
    workflow = build_workflow(load_recipe("smoke", []))
    with one_line(UsageError, match=says):
        parse_steps(text, workflow=workflow, folder="memory://traces")
    assert parse_steps("20:25", workflow=workflow, folder="f") == Profiling(first_step=20, last_step=25, folder="f")
