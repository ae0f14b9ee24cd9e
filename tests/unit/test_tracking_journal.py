"""Laws of the journal: what has been said is on disk, in order, until it has arrived."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from components.runtime.tracking import journal as journal_module
from components.runtime.tracking.delivery import flatten
from components.runtime.tracking.journal import left_journals, new_journal
from components.runtime.tracking.lines import coalesce

HERE = {"tracking_uri": "http://here", "experiment": "x"}


def event(name: str, key: str = "", **values: object) -> dict:
    return {"event": name, "run": "r", "key": key, **values}


def points(key: str, step: int) -> dict:
    return event("metrics", key, points=[["loss", step, 0.5, 1000 + step]])


def test_events_are_read_back_in_order_from_where_they_were_marked(tmp_path: Path):
    journal = new_journal(tmp_path, destination=HERE)
    for step in range(5):
        journal.append(points("k", step))
    first, position = journal.unshipped(limit=3)
    assert [e["points"][0][1] for e in first] == [0, 1, 2]
    assert journal.unshipped(limit=3)[0] == first, "what is not marked is read again"
    journal.mark(position)
    assert [e["points"][0][1] for e in journal.unshipped(limit=3)[0]] == [3, 4]


def test_a_journal_that_has_arrived_leaves_nothing_and_another_waits(tmp_path: Path):
    arrived, waiting = (new_journal(tmp_path, destination=HERE) for _ in range(2))
    for journal in (arrived, waiting):
        journal.append(event("text", blob=journal.write_blob(b"hello", ".txt")))
    arrived.mark(arrived.unshipped(limit=9)[1])
    for journal in (arrived, waiting):
        journal.close()
    (left,) = left_journals(tmp_path, destination=HERE)
    assert left.folder == waiting.folder
    assert left.blob(left.lines()[0]["blob"]).read_bytes() == b"hello"
    assert not arrived.folder.exists()


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/hostname", "a/b.txt", ""])
def test_a_file_of_a_journal_lies_in_it(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="is no name"):
        new_journal(tmp_path, destination=HERE).blob(name)


def test_a_journal_is_taken_up_only_for_its_own_destination_and_not_while_in_use(tmp_path: Path):
    journal = new_journal(tmp_path, destination=HERE)
    journal.append(event("metrics", points=[]))
    assert left_journals(tmp_path, destination=HERE) == []
    journal.close()
    assert left_journals(tmp_path, destination=HERE | {"tracking_uri": "http://there"}) == []
    assert len(left_journals(tmp_path, destination=HERE)) == 1


def test_the_thread_that_sends_lets_go_of_a_journal_that_another_thread_began(tmp_path: Path):
    journal = new_journal(tmp_path, destination=HERE)
    journal.append(event("metrics", points=[]))
    sender = threading.Thread(target=journal.close)
    sender.start()
    sender.join()
    assert [left.folder for left in left_journals(tmp_path, destination=HERE)] == [journal.folder]


def test_who_comes_upon_a_journal_that_is_just_being_removed_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal, locked = new_journal(tmp_path, destination=HERE), journal_module._locked

    def removed_meanwhile(folder: Path):
        journal.close()
        return locked(folder)

    monkeypatch.setattr(journal_module, "_locked", removed_meanwhile)
    assert left_journals(tmp_path, destination=HERE) == []
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_loses_nothing_that_it_had_said(tmp_path: Path):
    program = f"""
        import os, signal
        from pathlib import Path
        from components.runtime.tracking.journal import new_journal
        journal = new_journal(Path("{tmp_path}"), destination={HERE})
        for step in range(100):
            journal.append({{"event": "metrics", "step": step}})
        journal._events.write(b'{{"event": "half a li')
        journal._events.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (journal,) = left_journals(tmp_path, destination=HERE)
    journal.append(event("end_run"))
    lines = journal.lines()
    assert [line.get("step") for line in lines[:-1]] == list(range(100))
    assert lines[-1]["event"] == "end_run", "a line that was cut short does not spoil the next"


def test_points_of_a_run_are_joined_up_to_its_next_other_event():
    said = [
        event("start_stage", "a"),
        points("a", 1),
        points("b", 1),
        points("a", 2),
        event("end_stage", "a"),
        points("b", 2),
        points("a", 3),
    ]
    joined = coalesce(said)
    shape = [(e["event"], e["key"], [p[1] for p in e.get("points", [])]) for e in joined]
    assert shape == [
        ("start_stage", "a", []),
        ("metrics", "a", [1, 2]),
        ("metrics", "b", [1, 2]),
        ("end_stage", "a", []),
        ("metrics", "a", [3]),
    ]
    assert said[1]["points"] == [["loss", 1, 0.5, 1001]], "what is on record is not changed"


def test_nested_parameters_become_flat_names():
    nested = {"name": "tiny", "base": {"betas": [0.9, 0.99], "text": {"dim": 8}, "empty": {}}, "none": None}
    assert flatten(nested) == {
        "name": "tiny",
        "base.betas": "[0.9, 0.99]",
        "base.text.dim": "8",
        "base.empty": "{}",
        "none": "null",
    }
