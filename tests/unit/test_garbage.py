"""Laws of `cascade gc`: what a run names and what somebody works on stay, whenever it is killed; all else goes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from components.configuration.usage import UsageError
from components.runtime.storage.artifact import (
    MANIFEST,
    Artifact,
    commit_artifact,
    describe,
    load_artifact,
    verify_files,
)
from components.runtime.storage.garbage import ANNOUNCED, PLAN, collect, find_garbage
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import Store
from pipelines.engine import driver
from pipelines.engine.run_report import announced
from pipelines.workflow import PlannedStage, Stage

HOLDER = {"id": "0", "host": "elsewhere", "pid": 1, "born": 0.0, "released": False}
COMMITTED = ("attempt-1/model.bin", "files/parts/shard.json", "files/shard.tar")
LEFT = ("attempt-2/model.bin", "train/finished.json", "train/step-000000001/weights", "work/part.npz")


def commit(root: Store, stage: str) -> Store:
    """A committed stage, with what it no longer needs."""
    store = root.join("stages", stage)
    for path in (*COMMITTED, *LEFT):
        store.write(path, path.encode())
    name, _, key = stage.partition("/")
    files = tuple(describe(path.encode(), path) for path in COMMITTED)
    commit_artifact(store, Artifact(kind="model", stage=name, key=key, files=files))
    return store


def name_in_run(root: Store, run: str, *stages: str, file: str = PLAN) -> None:
    named = [dict(zip(("name", "key"), stage.split("/"), strict=True)) for stage in stages]
    root.write(f"runs/{run}/{file}", json.dumps({"stages": named}).encode())


def beat(root: Store, stage: str, count: int, **changes: object) -> None:
    """A heartbeat of a driver on another machine."""
    content = json.dumps(HOLDER | {"beat": count} | changes).encode()
    root.write(f"stages/{stage}/lease/00000001.json", content)


def found(root: Store, **settings: object) -> list[str]:
    return [garbage.path.removeprefix("stages/") for garbage in find_garbage(root, ttl=0, **settings)]


def test_garbage_is_what_no_manifest_lists(any_store: str) -> None:
    root = Store(any_store)
    store = root.join("stages", "base/k")
    for path in LEFT:
        store.write(path, b"data")
    assert find_garbage(root) == []  # not committed: it resumes from there
    commit(root, "base/k")
    garbage = find_garbage(root)
    assert [folder.path for folder in garbage] == [f"stages/base/k/{name}" for name in ("attempt-2", "train", "work")]
    assert collect(root, garbage) == garbage
    assert find_garbage(root) == []
    artifact = load_artifact(store)
    assert artifact is not None
    assert verify_files(artifact.store, artifact.files) == []
    garbage = find_garbage(root, unused=True)
    assert [folder.path for folder in garbage] == ["stages/base/k"]
    assert collect(root, garbage, unused=True) == garbage
    assert root.list() == []
    assert find_garbage(root, unused=True) == []


def test_what_a_run_names_stays_from_the_moment_that_it_is_announced(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    for stage in ("base/ended", "base/begun", "base/unused"):
        commit(root, stage)
    name_in_run(root, "a", "base/ended")
    name_in_run(root, "b", "base/begun", file=ANNOUNCED)
    whole = [path for path in found(root, unused=True) if path.count("/") == 1]
    assert whole == ["base/unused"]


def test_what_somebody_works_on_is_left_alone(tmp_path: Path) -> None:
    """Also what would be garbage in a stage of a run, and what no run names."""
    root, waits = Store(str(tmp_path)), []
    for stage in ("base/used", "base/unused"):
        commit(root, stage)
        beat(root, stage, 1)
    name_in_run(root, "a", "base/used")

    def wait(line: str) -> None:
        waits.append(line)
        for stage in ("base/used", "base/unused"):
            beat(root, stage, 2)

    assert found(root, unused=True, on_wait=wait) == []
    (line,) = waits
    assert "stages/base/unused, stages/base/used" in line


def test_a_holder_is_dead_whose_heart_stands_still_between_two_looks(tmp_path: Path) -> None:
    root, waits = Store(str(tmp_path)), []
    commit(root, "base/k")
    beat(root, "base/k", 7)
    garbage = find_garbage(root, unused=True, ttl=0, on_wait=waits.append)
    assert [each.path for each in garbage] == ["stages/base/k"]
    assert len(waits) == 1
    beat(root, "base/k", 8)  # it lives all the same: its network was away
    assert collect(root, garbage, unused=True) == []
    beat(root, "base/k", 7)
    assert collect(root, garbage, unused=True) == garbage
    assert root.list() == []


def test_a_holder_that_died_on_this_machine_or_let_go_is_not_waited_for(tmp_path: Path) -> None:
    root, waits = Store(str(tmp_path)), []
    for stage in ("base/died", "base/released"):
        commit(root, stage)
    here = Lease(root.join("nowhere"), on_lost=lambda: None).owner
    beat(root, "base/died", 3, **here | {"born": 0.5})  # a process that had the same number
    beat(root, "base/released", 3, released=True)
    assert found(root, unused=True, on_wait=waits.append) == ["base/died", "base/released"]
    assert waits == []


def test_nothing_is_deleted_that_is_needed_since_it_was_found(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    for stage in ("base/named", "base/held", "base/forced"):
        commit(root, stage)
    before = root.list("stages")
    whole = find_garbage(root, unused=True)
    parts = [each for each in find_garbage(root) if "forced" in each.path]
    name_in_run(root, "a", "base/named", "base/forced", file=ANNOUNCED)
    lease = Lease(root.join("stages", "base/held", "lease"), on_lost=lambda: None)
    assert lease.acquire(is_done=lambda: False, on_wait=lambda line: None)
    root.delete(f"stages/base/forced/{MANIFEST}")  # as a try does that is forced: what it trains lies in train/
    assert collect(root, whole, unused=True) == []
    assert collect(root, parts) == []
    lease.release()
    kept = [info for info in before if info.path != f"stages/base/forced/{MANIFEST}"]
    assert [info for info in root.list("stages") if "/lease/" not in info.path] == kept


def test_a_run_that_looks_just_before_the_deletion_keeps_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, delete = Store(str(tmp_path)), Store.delete
    store = commit(root, "base/k")
    garbage, before = find_garbage(root, unused=True), root.list("stages")

    def delete_late(self: Store, path: str) -> None:
        if path == MANIFEST:
            name_in_run(root, "a", "base/k", file=ANNOUNCED)  # and it has seen the manifest
        delete(self, path)

    monkeypatch.setattr(Store, "delete", delete_late)
    assert collect(root, garbage, unused=True) == []
    assert load_artifact(store) is not None
    assert [info for info in root.list("stages") if "/lease/" not in info.path] == before


class KilledError(BaseException):
    """No `except Exception` and no clean-up of a killed process sees it."""


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End `collect` after so many deletions, as SIGKILL would: its lease stays."""
    left, real = [count], {name: getattr(Store, name) for name in ("delete", "delete_folder")}

    def counted(name: str):
        def delete(self: Store, path: str = "") -> None:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            real[name](self, path)

        return delete

    for name in real:
        monkeypatch.setattr(Store, name, counted(name))
    monkeypatch.setattr(Lease, "release", lambda self: self._stop.set())
    monkeypatch.setattr(Lease, "withdraw", lambda self: None)


def contents(root: Store) -> dict[str, bytes]:
    return {info.path: root.read(info.path) for info in root.list() if "/lease/" not in info.path}


def test_a_collection_that_is_killed_loses_nothing_and_the_next_one_ends_it(tmp_path: Path) -> None:
    """At each of its deletions, with a stage that a run names, one that is announced and one that somebody works on."""
    steps, whole = 0, None
    while True:
        root = Store(str(tmp_path / str(steps)))
        for stage in ("base/used", "base/begun", "base/held", "base/unused"):
            commit(root, stage)
        name_in_run(root, "a", "base/used")
        name_in_run(root, "b", "base/begun", file=ANNOUNCED)
        before, beats = contents(root), iter(range(100))

        def find(root: Store = root, beats=beats):
            beat(root, "base/held", next(beats))
            on_wait = lambda line: beat(root, "base/held", next(beats))  # noqa: E731
            return find_garbage(root, unused=True, ttl=0, on_wait=on_wait)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("components.runtime.storage.store.TRANSFERS", 1)
            kill_after(steps, patch)
            ended = True
            try:
                collect(root, find(), unused=True)
            except KilledError:
                ended = False
        lasting = {
            path: data
            for path, data in before.items()
            if "/held/" in path or (("/used/" in path or "/begun/" in path) and not path.endswith(LEFT))
        }
        there = contents(root)
        assert lasting.items() <= there.items()
        for stage in (f"stages/base/{key}" for key in root.folders("stages/base")):
            artifact = load_artifact(root.join(stage))
            assert artifact is None or verify_files(artifact.store, artifact.files) == []
            for says, what in (("train/finished.json", COMMITTED[0]), ("files/parts/shard.json", "files/shard.tar")):
                assert f"{stage}/{says}" not in there or f"{stage}/{what}" in there
        collect(root, find(), unused=True)
        whole = whole or contents(root)
        assert contents(root) == whole
        if ended:
            break
        steps += 1
    assert steps > 15
    assert not any("unused" in path for path in whole)
    assert not any(path.endswith(LEFT) for path in whole if "/held/" not in path)


def planned_stage(store: Store) -> list[PlannedStage]:
    """The plan of a run with a single stage, which is cached."""
    stage = Stage("base", lambda config, context: None, driver.RunOptions())  # type: ignore[arg-type]
    return [PlannedStage(stage, "k", store, load_artifact(store), False, {})]


def test_an_announcement_is_taken_back_where_the_run_is_refused(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    planned = planned_stage(commit(root, "base/k"))
    with announced(root, "a", planned):
        pass
    assert found(root, unused=True) == ["base/k/attempt-2", "base/k/train", "base/k/work"]
    root.delete(f"runs/a/{ANNOUNCED}")
    with pytest.raises(UsageError, match="no room"), announced(root, "a", planned):
        raise UsageError("no room")
    assert not root.exists(f"runs/a/{ANNOUNCED}")
    name_in_run(root, "a", "base/of the run before", file=ANNOUNCED)
    with pytest.raises(UsageError, match="no room"), announced(root, "a", planned):
        raise UsageError("no room")
    assert b"of the run before" in root.read(f"runs/a/{ANNOUNCED}")


def test_a_run_does_not_begin_whose_artifacts_were_deleted_since_it_was_planned(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    planned = planned_stage(commit(root, "base/k"))
    collect(root, find_garbage(root, unused=True), unused=True)
    said = "base: deleted since the run was planned; run the same command again"
    with pytest.raises(UsageError, match=said), announced(root, "a", planned):
        pass


def test_a_run_is_announced_before_it_starts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = Store(str(tmp_path)), []

    def share(prepared: driver.Prepared, *rest: object) -> None:
        stages = json.loads(root.read(f"runs/{prepared.run}/{ANNOUNCED}"))["stages"]
        seen.append([stage["key"] for stage in stages] == [entry.key for entry in prepared.planned])
        raise UsageError("that is all")

    monkeypatch.setattr(driver, "_share", share)
    with pytest.raises(UsageError, match="that is all"):
        driver.run(driver.RunOptions(recipe="smoke", storage=root.uri, tracking="none"), Console(file=io.StringIO()))
    assert seen == [True]
