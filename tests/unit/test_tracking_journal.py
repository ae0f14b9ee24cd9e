"""Laws of the log: what has been said is on disk, in order, until it has arrived, and in the folder of its stage."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from components.configuration.optimization import OptimizationConfig
from components.runtime import events
from components.runtime.events import LogEntry, Metrics, StageEnded, StageStarted
from components.runtime.storage.artifact import Artifact, FileEntry
from components.runtime.storage.store import Store
from components.runtime.tracking import event_log
from components.runtime.tracking.delivery import batches, flatten
from components.runtime.tracking.event_log import (
    HEADER,
    SEGMENT_BYTES,
    EventLog,
    Journal,
    Segments,
    left_journals,
    open_journal,
    stage_points,
    stage_warnings,
)
from components.runtime.tracking.runs import TrackedRun, what_is_missing

HERE = {"tracking_uri": "http://here", "experiment": "x"}
ARTIFACT = Artifact(
    kind="report",
    stage="base",
    key="k",
    files=(FileEntry(path="a.json", bytes=12, sha256="0" * 64),),
    metadata={"samples": 7},
    provenance={"run": "another"},
    root="s3://bucket/stages/base/k",
)
EVENTS: list[events.Event] = [  # one of each kind
    events.RunStarted("run", "name: tiny\n", {"base": {"betas": [0.9, 0.99]}}, {"name": "tiny"}),
    events.StageHeld("base", "queued", "another driver has it"),
    events.StageStarted("base", "k", {"total_steps": 2}, {"images": ARTIFACT}),
    events.Progress("base", 1, 2),
    events.Metrics("base", 1, {"loss": np.float32(0.5)}),
    events.Image("base", 1, "grid", b"\x89PNG\xff"),
    events.Text("base", "notes.md", "all well"),
    events.Warning("base", "little room"),
    events.StageEnded("base", "FAILED", error="worker died"),
    events.StageCached("base", ARTIFACT),
    events.ModelsDescribed("Recipe `tiny`.", "Run `run`."),
    events.RunEnded("FAILED"),
]


def record(event: events.Event, key: str = "", time: int = 1000) -> LogEntry:
    return LogEntry(time, "r", "tiny", key, event)


def line(step: int) -> bytes:
    return record(Metrics("base", step, {"loss": 0.5}), "k").line()


def steps(records: list[LogEntry]) -> list[int]:
    return [each.event.step for each in records if isinstance(each.event, Metrics)]


def test_every_kind_of_event_is_read_as_it_was_written():
    assert {type(event) for event in EVENTS} == {*get_args(events.Event)}
    for event in EVENTS:
        again = LogEntry.read(record(event, "k").line())
        assert again == record(event, "k")
        assert getattr(again.event, "artifact", None) != ARTIFACT or again.event.artifact.root == ARTIFACT.root


def test_events_are_read_back_in_order_from_where_they_were_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = open_journal(tmp_path, destination=HERE)
    for step in range(5):
        journal.append(line(step))
    first, position = journal.unshipped(limit=3)
    assert steps(first) == [0, 1, 2]
    assert journal.unshipped(limit=3)[0] == first, "what is not marked is read again"
    journal.mark(position)
    assert steps(journal.unshipped(limit=3)[0]) == [3, 4]
    monkeypatch.setattr(event_log, "BYTES_AT_ONCE", 1)
    assert steps(journal.unshipped(limit=3)[0]) == [3], "what is sent at once is limited in bytes too"


def test_a_journal_that_has_arrived_leaves_nothing_and_another_waits(tmp_path: Path):
    arrived, waiting = (open_journal(tmp_path, destination=HERE) for _ in range(2))
    for journal in (arrived, waiting):
        journal.append(line(1))
    arrived.mark(arrived.unshipped(limit=9)[1])
    for journal in (arrived, waiting):
        journal.close()
    (left,) = left_journals(tmp_path, destination=HERE)
    assert left.folder == waiting.folder
    assert steps(left.records()) == [1]
    assert not arrived.folder.exists()


def test_a_journal_is_taken_up_only_for_its_own_destination_and_not_while_in_use(tmp_path: Path):
    journal = open_journal(tmp_path, destination=HERE)
    journal.append(line(1))
    assert left_journals(tmp_path, destination=HERE) == []
    journal.close()
    assert left_journals(tmp_path, destination=HERE | {"tracking_uri": "http://there"}) == []
    assert len(left_journals(tmp_path, destination=HERE)) == 1


def test_the_thread_that_sends_lets_go_of_a_journal_that_another_thread_began(tmp_path: Path):
    journal = open_journal(tmp_path, destination=HERE)
    journal.append(line(1))
    sender = threading.Thread(target=journal.close)
    sender.start()
    sender.join()
    assert [left.folder for left in left_journals(tmp_path, destination=HERE)] == [journal.folder]


def test_who_comes_upon_a_journal_that_is_just_being_removed_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal, locked = open_journal(tmp_path, destination=HERE), event_log._locked

    def removed_meanwhile(folder: Path):
        journal.close()
        return locked(folder)

    monkeypatch.setattr(event_log, "_locked", removed_meanwhile)
    assert left_journals(tmp_path, destination=HERE) == []
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_loses_nothing_that_it_had_said(tmp_path: Path):
    program = f"""
        import os, signal
        from pathlib import Path
        from components.runtime.tracking.event_log import open_journal
        from tests.unit.test_tracking_journal import line
        journal = open_journal(Path("{tmp_path}"), destination={HERE})
        for step in range(100):
            journal.append(line(step))
        journal.append(b'{{"event": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (journal,) = left_journals(tmp_path, destination=HERE)
    journal.append(record(events.RunEnded("KILLED")).line())
    records = journal.records()
    assert steps(records[:-1]) == list(range(100))
    assert records[-1].event == events.RunEnded("KILLED"), "a line that was cut short does not spoil the next"


def test_a_record_of_another_version_does_not_hold_up_the_rest(tmp_path: Path):
    journal = open_journal(tmp_path, destination=HERE)
    for text in (b'{"event": "Unheard", "fields": {}}\n', line(1).replace(b'"step"', b'"stride"'), line(2)):
        journal.append(text)
    assert steps(journal.records()) == [2]


def open_log(tmp_path: Path) -> tuple[EventLog, Journal]:
    journal = open_journal(tmp_path / "spool", destination=HERE)
    log = EventLog(journal)
    log.append(events.RunStarted("r", "", {}, {"name": "tiny"}))
    return log, journal


def test_a_record_says_which_run_and_which_stage_key_it_is_of(tmp_path: Path):
    log, journal = open_log(tmp_path)
    for event in (StageStarted("base", "k", {}, {}), Metrics("base", 1, {}), Metrics("", 1, {})):
        log.append(event)
    assert [(each.run, each.models, each.key) for each in journal.records()] == [
        ("r", "tiny", key) for key in ("", "k", "k", "")
    ]


def test_the_log_of_a_stage_in_storage_is_one_file_until_that_is_large(tmp_path: Path):
    """A write puts the last file again, so it must not grow for ever, nor each line be a file."""
    stage, lines = Store(str(tmp_path)), ["one", "two", "x" * SEGMENT_BYTES, "three", "four"]
    segments = Segments(stage.join("log"), "w")
    for number, line in enumerate(lines):
        segments.append(LogEntry(number, "r", "tiny", "k", events.Warning("base", line)))
        segments.write()
    assert [info.path for info in stage.list("log")] == ["log/w-000000.jsonl", "log/w-000001.jsonl"]
    assert stage_warnings(stage) == lines


def test_a_journal_that_is_delivered_and_gone_lacks_nothing(tmp_path: Path):
    _, journal = open_log(tmp_path)
    assert [type(each.event) for each in journal.left()] == [events.RunStarted]
    (journal.folder / HEADER).unlink()
    assert journal.left() == []


def test_what_a_killed_process_left_open_ends_as_killed_when_it_was_last_heard_of(tmp_path: Path):
    log, journal = open_log(tmp_path)
    ended = [StageStarted("images", "a", {}, {}), StageEnded("images", "FINISHED"), StageStarted("base", "b", {}, {})]
    for number, event in enumerate(ended):
        log.append(event, time_ms=1000 + number)
    left = EventLog(journal)
    left.end_killed()
    *_, stage, run = journal.records()
    assert (stage.event, stage.key, stage.time) == (StageEnded("base", "KILLED"), "b", 1002)
    assert (run.event.status, run.run, run.time) == ("KILLED", "r", 1002)
    length = len(journal.records())
    EventLog(journal).end_killed()
    assert len(journal.records()) == length, "once is enough"


def test_a_log_drops_the_end_of_a_stage_that_never_began_and_a_last_word_after_its_end(tmp_path: Path):
    log, journal = open_log(tmp_path)
    log.append(StageEnded("base", "FAILED"))
    log.end("FINISHED")
    log.append(Metrics("base", 1, {}))
    assert [type(each.event) for each in journal.records()] == [events.RunStarted, events.RunEnded]


def test_the_points_of_a_stage_are_in_its_folder_in_segments_and_a_later_try_replaces_those_that_it_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(event_log, "SEGMENT_BYTES", 300)
    place = Store(str(tmp_path / "base"))
    for value, tried in ((1.0, range(1, 7)), (2.0, range(5, 9))):  # the second from the checkpoint of step 4
        log = EventLog()
        log.append(StageStarted("base", "k", {}, {}, place.uri))
        for step in tried:
            log.append(Metrics("base", step, {"loss": value}))
            log.store("base")
    assert len(place.list("log")) > 2
    assert [values["loss"] for values in stage_points(place).values()] == [1.0] * 4 + [2.0] * 4


def test_lines_that_storage_did_not_take_are_stored_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, log = Store(str(tmp_path / "base")), EventLog()
    log.append(StageStarted("base", "k", {}, {}, place.uri))
    log.append(Metrics("base", 1, {"loss": 1.0}))

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(OSError, match="no space"):
            log.store("base")
    log.store("base")
    assert stage_points(place) == {1: {"loss": 1.0}}


def test_points_of_a_run_are_joined_up_to_its_next_other_event():
    def point(key: str, step: int) -> LogEntry:
        return record(Metrics("s", step, {"loss": 0.5}), key)

    began, ended = record(StageStarted("s", "a", {}, {}), "a"), record(StageEnded("s", "FINISHED"), "a")
    joined = batches([began, point("a", 1), point("b", 1), point("a", 2), ended, point("b", 2), point("a", 3)])
    assert [(each[0].key, steps(each)) for each in joined] == [
        ("a", []),
        ("a", [1, 2]),
        ("b", [1, 2]),
        ("a", []),
        ("a", [3]),
    ]


def test_nested_parameters_become_flat_names():
    """But patterns of parameters are no names of MLflow's."""
    base = {"betas": [0.9, 0.99], "text": {"dim": 8}, "empty": {}, "parts": {"*.bias": {"learning_rate": 0.5}}}
    assert flatten({"name": "tiny", "base": base, "none": None}) == {
        "name": "tiny",
        "base.betas": "[0.9, 0.99]",
        "base.text.dim": "8",
        "base.empty": "{}",
        "base.parts": '{"*.bias": {"learning_rate": 0.5}}',
        "none": "null",
    }


def test_a_journal_of_another_user_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = (open_journal(tmp_path, destination=HERE, name=name) for name in ("theirs", "ours"))
    for journal in (theirs, ours):
        journal.append(line(1))
        journal.close()
    read = Path.read_text

    def refused(path: Path, *args: object) -> str:
        if path.parent.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return read(path, *args)

    monkeypatch.setattr(Path, "read_text", refused)
    assert [journal.folder.name for journal in left_journals(tmp_path, destination=HERE)] == ["ours"]


OPTIMIZATION = OptimizationConfig(
    total_steps=50, global_batch_size=8, learning_rate=1e-3, warmup_steps=0, log_every=20, sample_every=25
)
TRAINING = {"optimization": OPTIMIZATION.model_dump()}


def trained(config: dict, *names: str) -> Artifact:
    files = tuple(FileEntry(path=name, bytes=1, sha256="0" * 64) for name in names)
    return Artifact(kind="model", stage="base", key="k", files=files, provenance={"config": config})


def arrived(points: set[int], images: set[int] = frozenset()) -> TrackedRun:
    return TrackedRun("r", 0, {"loss": set(points)}, {("grid", step) for step in images})


@pytest.mark.parametrize(
    ("config", "names", "tracked", "words"),
    [
        (TRAINING, [], arrived({20, 40, 50}), ""),
        (TRAINING, [], arrived({20, 50}), "points of step 40"),
        (TRAINING, [], arrived(set()), "points of 3 steps from 20 to 50"),
        (TRAINING, ["preview.png"], arrived({20, 40, 50}, {25, 50}), ""),
        (TRAINING, ["preview.png"], arrived({20, 40, 50}), "images of 2 steps from 25 to 50"),
        (TRAINING, [], arrived({20, 50}, {50}), "points of step 40 and images of step 25"),
        ({"limit": 5}, [], arrived(set()), ""),
    ],
)
def test_what_is_missing_is_named(config: dict, names: list[str], tracked: TrackedRun, words: str):
    assert what_is_missing(trained(config, *names), tracked) == words
