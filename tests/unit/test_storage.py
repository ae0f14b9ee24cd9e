"""Laws of storage: whole files or nothing, one winner, nothing accepted that differs from its manifest."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from components.configuration.usage import UsageError
from components.runtime.storage.artifact import Artifact, ArtifactError, commit_artifact, describe, load_artifact
from components.runtime.storage.connection import FencedError
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import SMALL_TRANSFERS, TRANSFERS, Store, StoreError, absolute, in_parallel
from pipelines.planning.profiles import tracking_uri
from tests.racing_drivers import race
from tests.refusals import one_line
from tests.stored_files import assert_one_wins


def test_a_file_reads_back_as_written_and_lists_once(any_store: str):
    store = Store(any_store)
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"three")
    assert store.read("a/b.bin") == b"three"
    assert [(info.path, info.bytes) for info in store.list()] == [("a/b.bin", 5)]
    assert [info.path for info in store.list("a")] == ["a/b.bin"]
    assert store.folders() == ["a"]
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.bin")


def test_a_listing_sees_what_another_writer_added_since(any_store: str):
    first, second = Store(any_store), Store(any_store)
    first.write("one", b"1")
    assert len(first.list()) == 1
    second.write("two", b"2")
    assert [info.path for info in first.list()] == ["one", "two"]


@pytest.mark.parametrize("kind", ["local", "s3", "gs", "az"])
def test_of_racing_writers_exactly_one_wins(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    """On local disks fsspec's mode="create" let several win in 30 of 40 rounds."""
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue(f"{kind}_bucket")
    assert_one_wins(uri, racers=4, rounds=8)


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
def test_a_missing_bucket_is_one_clear_line(kind: str, request: pytest.FixtureRequest):
    request.getfixturevalue(f"{kind}_bucket")
    with one_line(
        StoreError, match=rf"storage {kind}://no-such-bucket/x can't be written: .*(bucket|container)"
    ) as caught:
        Store(f"{kind}://no-such-bucket/x").check_writable()
    assert "http" not in str(caught.value)


def _artifact(data: bytes, name: str = "attempt-1/a.bin") -> Artifact:
    return Artifact(kind="model", stage="base", key="k", files=(describe(data, name),))


def test_an_artifact_is_committed_once_and_the_loser_adopts_the_winner(any_store: str):
    store = Store(any_store)
    assert load_artifact(store) is None
    store.write("attempt-1/a.bin", b"data")
    first = commit_artifact(store, _artifact(b"data"))
    second = commit_artifact(store, _artifact(b"other"))
    assert first == second
    assert second.read("a.bin") == b"data"


def test_a_file_that_differs_from_its_manifest_is_refused(any_store: str, tmp_path: Path):
    store = Store(any_store)
    store.write("attempt-1/a.bin", b"data")
    artifact = commit_artifact(store, _artifact(b"data"))
    store.write("attempt-1/a.bin", b"dat\x00")
    with pytest.raises(ArtifactError, match=r"a\.bin differs"):
        artifact.read("a.bin")
    with pytest.raises(ArtifactError, match=r"a\.bin differs"):
        artifact.download(tmp_path / "copy")


def _lease(store: Store, ttl: float = 30.0) -> Lease:
    return Lease(store, ttl=ttl, poll=0.05, on_lost=lambda: None)


def test_a_lease_has_one_holder_and_passes_on_when_released(any_store: str):
    store, order = Store(any_store), []
    first, second = _lease(store), _lease(store)
    assert first.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    waiter = threading.Thread(
        target=lambda: (second.acquire(is_done=lambda: False, on_wait=lambda reason: None), order.append("second"))
    )
    waiter.start()
    time.sleep(0.5)
    order.append("first")
    first.release()
    waiter.join(20)
    second.release()
    assert order == ["first", "second"]


def test_the_next_holder_may_come_while_a_release_is_being_written(monkeypatch: pytest.MonkeyPatch):
    """It deletes the file of the generation before, whose size the first holder is about to compare."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    first, second = _lease(store), _lease(store)
    assert first.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    size = MemoryFileSystem.size

    def taken_meanwhile(filesystem: MemoryFileSystem, path: str) -> int:
        monkeypatch.setattr(MemoryFileSystem, "size", size)
        assert second.acquire(is_done=lambda: False, on_wait=lambda reason: None)
        return size(filesystem, path)

    monkeypatch.setattr(MemoryFileSystem, "size", taken_meanwhile)
    first.release()
    assert [info.path for info in store.list()] == ["00000002.json"]
    second.release()


def test_a_lease_without_heartbeat_is_taken_over_and_the_old_holder_is_told(tmp_path: Path):
    store, lost = Store(str(tmp_path)), threading.Event()
    stalled = Lease(store, ttl=1.2, poll=0.05, on_lost=lost.set)
    assert stalled.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    state = json.loads(store.read("00000001.json"))
    stalled._write = lambda **state: None  # the holder's machine sleeps: its thread runs, its heartbeat does not arrive
    store.write("00000001.json", json.dumps({**state, "host": "elsewhere"}).encode())
    successor = _lease(store, ttl=1.2)
    assert successor.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    assert lost.wait(5)
    successor.release()


def test_a_holder_that_stood_still_writes_lists_and_deletes_no_more(any_store: str):
    """Its machine slept: nothing told it that another took over, and its next request is refused."""
    root, always = Store(any_store), {"is_done": lambda: False, "on_wait": lambda reason: None}
    holder, successor = _lease(root.join("lease")), _lease(root.join("lease"))
    assert holder.acquire(**always)
    stale = Store(root.uri, holder.fence).join("train")
    stale.write("list", b"of the first")
    assert not holder.is_lost()
    assert successor.take(successor.look())
    Store(root.uri, successor.fence).join("train").write("list", b"of the second")
    for harm in (
        lambda: stale.write("list", b"late"),
        lambda: stale.write_once("manifest", b"late"),
        lambda: stale.upload(Path(__file__), "weights"),
        lambda: stale.delete("list"),
        lambda: stale.delete_folder(),
        lambda: stale.list(),
        lambda: commit_artifact(Store(root.uri, holder.fence), _artifact(b"late")),
    ):
        with pytest.raises(FencedError, match="another driver took over"):
            harm()
    assert holder.is_lost()
    assert not successor.is_lost()
    assert [(info.path, root.read(info.path)) for info in root.list("train")] == [("train/list", b"of the second")]
    for lease in (holder, successor):
        lease.release()


def test_of_two_that_hold_one_generation_the_overwritten_one_is_told(tmp_path: Path):
    """As a store makes it whose conditional write looks before it writes: Swift's."""
    store, lost = Store(str(tmp_path)), {"first": threading.Event(), "second": threading.Event()}
    first, second = (Lease(store, ttl=0.6, poll=0.05, on_lost=lost[name].set) for name in lost)
    assert first.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    store.delete("00000001.json")  # as if the second had not seen it
    assert second.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    assert lost["first"].wait(5)
    assert not lost["second"].wait(0.5)
    second.release()


def test_a_clock_that_is_set_makes_no_holder_look_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start times of processes are told by the wall clock: set by an hour, the holder seemed to be another process."""
    store, calls = Store(str(tmp_path)), iter([False] * 5 + [True])
    holder, waiter = _lease(store), _lease(store)
    assert holder.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted + 3600)
    assert not waiter.acquire(is_done=calls.__next__, on_wait=lambda reason: None)
    holder.release()


HOLD = """
import os, sys
from components.runtime.storage.connection import FencedError
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import Store

assert Lease(Store(sys.argv[1]), on_lost=lambda: None).acquire(is_done=lambda: False, on_wait=lambda reason: None)
os._exit(9)
"""


def test_a_holder_that_died_on_this_machine_is_followed_at_once_and_one_elsewhere_is_not(tmp_path: Path):
    """As is one whose number another process has now. A heartbeat would be waited for half a minute."""
    store = Store(str(tmp_path))
    assert subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], timeout=60).returncode == 9
    (name,) = [info.path for info in store.list()]
    state = json.loads(store.read(name))

    def taken(**changes: object) -> bool:
        looks, successor = iter([False] * 3 + [True]), _lease(store)
        store.write(name, json.dumps(state | changes).encode())
        taken = successor.acquire(is_done=looks.__next__, on_wait=lambda reason: None)
        successor.release()
        for info in store.list():
            store.delete(info.path)
        return taken

    assert taken()
    assert taken(pid=os.getpid())
    assert not taken(host="elsewhere")
    assert not taken(space="pid:[another container's]"), "its number means nothing here, and nobody has it"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3:/bucket/runs", "write s3://bucket/runs"),
        *((address, "write s3://PATH") for address in ("s3:", "s3://", "s3:///")),
        ("file:/data", "write file:///data"),
        ("~nobody-of-this-name/runs", "write the whole path"),
        ("/data/exp::1", "rename"),
        ("nope://x", "nope://.*use a local path, s3://bucket/path or another fsspec URL"),
    ],
)
def test_addresses_that_would_be_other_places_are_refused(address: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        Store(absolute(address)).check_writable()


def test_a_damaged_lease_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "00000001.json").write_bytes(b"")
    with one_line(StoreError, r"00000001\.json can't be used: it is no lease; delete the file if no driver works"):
        _lease(Store(str(tmp_path))).look()


@pytest.mark.parametrize("address", ["localhost:5000", "10.0.0.7:5000/", "http//mlflow:5000", "http:/mlflow"])
def test_an_address_of_mlflow_without_a_protocol_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"has no protocol: write http://HOST:PORT"):
        tracking_uri(address)


def test_a_waiter_adopts_when_the_work_is_done(tmp_path: Path):
    store = Store(str(tmp_path))
    holder, done = _lease(store), threading.Event()
    assert holder.acquire(is_done=done.is_set, on_wait=lambda reason: None)
    threading.Timer(0.3, done.set).start()
    assert not _lease(store).acquire(is_done=done.is_set, on_wait=lambda reason: None)
    holder.release()


@pytest.mark.parametrize("most", [1, TRANSFERS, SMALL_TRANSFERS])
def test_so_many_work_at_a_time_and_no_more(most: int) -> None:
    """All of a group meet, or the barrier breaks; what comes meanwhile would be one too many."""
    meeting, lock, working, seen = threading.Barrier(most, timeout=60), threading.Lock(), 0, list[int]()

    def work(number: int) -> int:
        nonlocal working
        with lock:
            seen.append(working := working + 1)
        meeting.wait()
        with lock:
            working -= 1
        meeting.wait()
        return number

    assert in_parallel(work, range(3 * most), most=most) == list(range(3 * most))
    assert max(seen) == most


def test_no_commit_is_lost_or_made_twice_whatever_drivers_and_store_do() -> None:
    """Ten thousand steps of it: `make faults GROUP=storage`."""
    assert race(600, seed=1)["request ok"] > 0
