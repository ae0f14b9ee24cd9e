"""Laws of storage on OpenStack Swift by its S3 protocol, and on what else answers in words of its own: what counts is
the status."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from components.runtime.storage.connection import StoreError
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import ALONE, Store
from tests.emulators import in_environment, new_bucket, swift_server
from tests.refusals import one_line
from tests.stored_files import answering, assert_bytes_arrive, assert_one_wins
from tests.waiting import eventually


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket."""
    with bucket(tmp_path_factory.mktemp("swift"), conditions=True) as url:
        yield url


@contextmanager
def bucket(folder: Path, *, conditions: bool) -> Iterator[str]:
    with swift_server(folder, conditions=conditions) as settings, in_environment(settings):
        s3fs.S3FileSystem.clear_instance_cache()
        yield new_bucket("s3")
    s3fs.S3FileSystem.clear_instance_cache()


def lease(store: Store, *, ttl: float = 30.0, lost: threading.Event | None = None) -> Lease:
    return Lease(store, ttl=ttl, poll=0.1, on_lost=(lost or threading.Event()).set)


def looks(number: int) -> Iterator[bool]:
    """Work that others have done after so many looks of a waiter."""
    return iter([False] * number + [True])


def test_files_arrive_and_are_written_once(swift: str, tmp_path: Path):
    store = Store(f"{swift}/store")
    store.check_writable()
    assert_bytes_arrive(store, tmp_path, files=3)
    store.delete_folder("once")
    assert store.list("once") == []


def test_of_racing_writers_the_losers_are_told(swift: str):
    """Swift looks whether there is a file before it writes one: of writers within the same milliseconds several win."""
    assert_one_wins(f"{swift}/race", racers=4, rounds=4, alone=False)


def test_a_lease_passes_on_and_its_last_holder_alone_writes(swift: str):
    root = Store(f"{swift}/leased")
    first, second = (lease(root.join("lease")) for _ in range(2))
    assert first.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    assert not second.acquire(is_done=looks(2).__next__, on_wait=lambda reason: None)
    first.release()
    assert second.acquire(is_done=looks(2).__next__, on_wait=lambda reason: None)
    Store(root.uri, second.fence).join("train").write("list", b"second")
    with pytest.raises(StoreError, match="another driver took over"):
        Store(root.uri, first.fence).join("train").write("list", b"first")
    second.release()


def test_of_holders_that_a_race_let_in_together_one_is_left_after_a_beat(swift: str):
    for round_ in range(4):
        store, gate = Store(f"{swift}/holders-{round_}"), threading.Barrier(3)
        lost = [threading.Event() for _ in range(3)]
        racers = [lease(store, ttl=1.2, lost=event) for event in lost]
        holders: list[int] = []

        def race(number: int, racers=racers, gate=gate, holders=holders) -> None:
            gate.wait()
            if racers[number].acquire(is_done=looks(1).__next__, on_wait=lambda reason: None):
                holders.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert holders
        assert eventually(lambda lost=lost, held=holders: sum(not lost[each].is_set() for each in held) == 1, 10)
        for each in holders:
            racers[each].release()


def test_a_wrong_secret_is_refused_without_repeating_it(swift: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    s3fs.S3FileSystem.clear_instance_cache()
    with one_line(StoreError, match="access denied") as caught:
        Store(f"{swift}/store").check_writable()
    assert "hunter2" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_ignores_conditions_is_refused_or_one_driver_s_by_its_user_s_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with bucket(tmp_path, conditions=False) as url:
        store = Store(f"{url}/store")
        with one_line(StoreError, match=r"has no conditional writes \(a second write .* set CASCADE_ONE_DRIVER=1$"):
            store.check_writable()
        monkeypatch.setenv(ALONE, "1")
        with caplog.at_level(logging.WARNING, logger="cascade"):
            store.check_writable()
        assert "CASCADE_ONE_DRIVER=1: never start a second driver on it" in caplog.text
        assert store.list() == []
        assert store.write_once("a", b"first")
        assert not store.write_once("a", b"second")
        assert store.read("a") == b"first"
        holder, other = (lease(store.join("lease")) for _ in range(2))
        assert holder.acquire(is_done=lambda: False, on_wait=lambda reason: None)
        assert not other.acquire(is_done=looks(2).__next__, on_wait=lambda reason: None)
        holder.release()


@contextmanager
def writing(*puts: tuple[int, bytes]) -> Iterator[list[str]]:
    """The requests that came to an S3 server that gives these answers to what is written, the last one again and again,
    and holds `theirs` at every address."""

    def answer(command: str, before: int) -> tuple[int, bytes]:
        others = {"DELETE": (204, b"")}.get(command, (200, b"theirs"))
        return puts[min(before, len(puts) - 1)] if command == "PUT" else others

    with answering(answer) as (address, came):
        with in_environment({"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}):
            s3fs.S3FileSystem.clear_instance_cache()
            yield came
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "body", [b"", b"<html>no</html>", b"<Error><Code>Exists</Code><Message>is there</Message></Error>"]
)
def test_a_refused_condition_is_known_by_its_status(body: bytes):
    with writing((412, body)) as came:
        assert not Store("s3://bucket").write_once("a", b"mine")
        assert Store("s3://bucket").write_once("a", b"theirs")  # whose first answer was lost
    assert came.count("PUT") == 2


def test_a_writer_that_another_one_is_just_in_the_way_of_tries_again():
    conflict = b"<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>"
    with writing((409, conflict), (200, b"")) as came:
        assert Store("s3://bucket").write_once("a", b"mine")
    assert came.count("PUT") == 2


def test_a_store_that_refuses_conditions_is_refused_or_one_driver_s_by_its_user_s_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As Swift before 2.36 answers."""
    words = b"<Error><Code>NotImplemented</Code><Message>Conditional object PUTs are not supported.</Message></Error>"
    refusal = r"no conditional writes \(.*Conditional object PUTs are not supported.*; use another, or a newer version"
    with writing((501, words)) as came, one_line(StoreError, match=refusal):
        Store("s3://bucket").check_writable()
    assert came.count("PUT") == 1
    monkeypatch.setenv(ALONE, "1")
    with writing((501, words)), caplog.at_level(logging.WARNING, logger="cascade"):
        Store("s3://bucket").check_writable()
        assert not Store("s3://bucket").write_once("a", b"mine")  # `theirs` is there
    assert "Conditional object PUTs are not supported" in caplog.text
