"""Laws of a store that is away for a while: all that is asked of it waits, says so, and arrives when it is back."""

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import fsspec
import pytest
import s3fs

from components.configuration.usage import UsageError
from components.data.given import RemoteFile
from components.data.listing import list_versions
from components.runtime.storage import connection, outages
from components.runtime.storage.connection import AwayError, StoreError
from components.runtime.storage.lease import Lease
from components.runtime.storage.store import Store, digest_of, in_parallel, read_url
from tests.emulators import in_environment
from tests.outages import Gate, How, gate
from tests.stored_files import answering

SECONDS = 1.2  # of an outage
PATIENCE = 20
QUICK = {"read_timeout": 0.3, "connect_timeout": 2, "retries": {"mode": "standard", "max_attempts": 1}}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(outages.SETTING, str(PATIENCE))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": QUICK})
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    outages._outages.clear()


@pytest.fixture
def network(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with gate(s3_server) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.address)
        s3fs.S3FileSystem.clear_instance_cache()
        Store("s3://no-bucket").exists("a")  # makes the client, which takes seconds on a busy machine
        yield between


@pytest.mark.parametrize("how", ["hangs", "refuses"])
def test_a_store_is_away_since_it_was_asked(how: How, s3_bucket: str, network: Gate, monkeypatch: pytest.MonkeyPatch):
    """The client's own tries take a minute and a half before anybody hears of a store that hangs."""
    store = Store(f"{s3_bucket}/store")
    store.write("there", b"data")
    for most in (connection.SILENT_SECONDS, 0.1):  # the second: as of a long transfer that broke off just now
        monkeypatch.setattr(connection, "SILENT_SECONDS", most)
        network.close_at(rb"^GET \S+/there", 3 * SECONDS, how)  # it tries twice
        with ThreadPoolExecutor() as pool:
            asked = time.monotonic()
            answer = pool.submit(store.read, "there")
            while not outages._outages and not answer.done():
                time.sleep(0.01)
            (outage,) = outages._outages.values()
            heard = time.monotonic()
            assert answer.result() == b"data"
        assert asked <= outage.since
        assert heard - outage.since >= (0.0 if how == "refuses" else min(most, QUICK["read_timeout"]))
        assert (outage.since - asked < QUICK["read_timeout"]) or most < QUICK["read_timeout"]


@pytest.mark.parametrize("how", get_args(How))
def test_whatever_is_asked_of_a_store_that_is_away_arrives_when_it_is_back(
    how: How, s3_bucket: str, network: Gate, tmp_path: Path
):
    store, data, expected = Store(f"{s3_bucket}/store"), b"as it was", digest_of(b"as it was")
    (tmp_path / "a").write_bytes(data)
    for name in ("there", "old"):
        store.write(name, data)
    names = {"old", "there", "written", "once", "sent"}
    asked = {
        "write": lambda: store.write("written", data) is None,
        "write once": lambda: store.write_once("once", data),
        "upload": lambda: store.upload(tmp_path / "a", "sent") is None,
        "delete": lambda: store.delete("old") is None,
        "read": lambda: store.read("there", expected=expected) == data,
        "check": lambda: store.check("there", expected) is None,
        "download": lambda: store.download("there", tmp_path, "back", expected=expected) is None,
        "open": lambda: RemoteFile(store.url("there")).read() == data,
        "exists": lambda: store.exists("there"),
        "list": lambda: {info.path for info in store.list()} <= names,
        "list with marks": lambda: {version.path for version in list_versions(store.uri)} <= names,
        "several": lambda: in_parallel(store.read, ["there", "there"]) == [data, data],
    }
    network.close_for(PATIENCE, how)
    with ThreadPoolExecutor(len(asked)) as pool:
        coming = {name: pool.submit(action) for name, action in asked.items()}
        time.sleep(SECONDS)
        assert not [name for name, answer in coming.items() if answer.done()], "answered by a store that is away"
        network.reopen()  # and not after a time: a busy machine looks too late
        assert all(answer.result() for answer in coming.values()), coming
    assert (tmp_path / "back").read_bytes() == data
    assert {info.path for info in store.list()} == names - {"old"}


def test_what_is_waited_for_is_said_and_how_long_it_took(
    s3_bucket: str, network: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(outages, "FIRST_WORD", 0.1)
    network.close_for(3 * SECONDS, "refuses")
    with caplog.at_level(logging.WARNING, "cascade"):
        Store(s3_bucket).write("a", b"1")
    said = [record.getMessage() for record in caplog.records if record.name == "cascade"]
    assert said[0].startswith(f"store {s3_bucket} away for 0:0")
    assert ", waiting until 0:20: Could not connect to the endpoint URL" in said[0]
    assert said[-1].startswith(f"store {s3_bucket} was away for 0:0")
    assert len(said) == 2


def test_a_store_that_stops_reading_in_the_midst_of_an_upload_is_away(
    s3_bucket: str, network: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The connection is there and takes no byte: more than buffers hold never leaves the client."""
    monkeypatch.setattr(outages, "FIRST_WORD", 0.1)
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    s3fs.S3FileSystem.clear_instance_cache()
    data = bytes(16 * 2**20)
    network.close_at(rb"^PUT \S+/a\b", 8 * SECONDS, "hangs")
    with caplog.at_level(logging.WARNING, "cascade"):
        Store(s3_bucket).write("a", data)
    assert f"store {s3_bucket} away for 0:0" in caplog.text
    assert f"store {s3_bucket} was away for 0:" in caplog.text
    assert Store(s3_bucket).read("a") == data


def test_after_that_the_first_cause_is_named_and_nothing_waits_again(
    s3_bucket: str, network: Gate, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(outages.SETTING, "1")
    network.close_for(30, "says 503")
    store, started = Store(s3_bucket), time.monotonic()
    with pytest.raises(AwayError, match=rf"^{s3_bucket}/a was away for 0:0\d: .*; check the network") as first:
        store.read("a")
    waited, started = time.monotonic() - started, time.monotonic()
    assert 1 <= waited < 12
    with pytest.raises(AwayError) as later:  # such as the release of a lease
        in_parallel(store.read, ["b"])
    assert time.monotonic() - started < 2
    cause = str(first.value).partition(": ")[2]
    assert str(later.value).partition(": ")[2] == cause


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_what_is_refused_is_no_outage(status: int, monkeypatch: pytest.MonkeyPatch):
    """A wrong key, a missing bucket, a request that the store does not take."""
    monkeypatch.delitem(fsspec.config.conf, "s3")
    body = b"<Error><Code>Nope</Code><Message>not like this</Message></Error>"
    with answering(lambda command, before: (status, body)) as (address, came):
        settings = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        s3fs.S3FileSystem.clear_instance_cache()
        with in_environment(settings), pytest.raises((StoreError, FileNotFoundError)) as caught:
            read_url("s3://bucket/a")
    assert not isinstance(caught.value, AwayError)
    assert len(came) <= 2  # a client may ask twice


def test_who_waits_beside_one_that_fails_gives_up(s3_bucket: str, network: Gate):
    network.close_for(30, "refuses")
    started = time.monotonic()

    def work(name: str) -> bytes:
        if name == "wrong":
            time.sleep(SECONDS)
            raise ValueError(name)
        return Store(s3_bucket).read(name)

    with pytest.raises(ValueError, match="wrong"):
        in_parallel(work, ["a", "b", "wrong"])
    assert time.monotonic() - started < SECONDS + 3


def test_an_interrupt_ends_all_waiting(s3_bucket: str, network: Gate):
    network.close_for(30, "refuses")
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of several that test ignores it
    threading.Timer(SECONDS, signal.pthread_kill, (main, signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_parallel(Store(s3_bucket).read, ["a", "b"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < SECONDS + 3


def test_a_process_in_a_hurry_tries_once(s3_bucket: str, network: Gate):
    network.close_for(30, "refuses")
    started = time.monotonic()
    with outages.hurried(), pytest.raises(AwayError):
        in_parallel(Store(s3_bucket).read, ["a"])
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("given", ["15m", "-1", "nan", "inf", ""])
def test_a_setting_that_is_no_time_is_refused_in_one_line(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(outages.SETTING, given)
    with pytest.raises(UsageError, match=f"^{outages.SETTING}={given}: write how many seconds"):
        outages.patience()


def test_a_holder_that_could_not_write_either_is_given_its_time_again(tmp_path: Path):
    """A waiter that had no answer for longer than a heartbeat's time has not seen that there was none."""
    store = Store(str(tmp_path))
    holder = {"id": "a", "host": "elsewhere", "pid": 1, "born": 0.0, "beat": 3, "released": False}
    store.write("00000001.json", json.dumps(holder).encode())

    class Blind(Lease):
        looks = 0

        def look(self):
            self.looks += 1
            if self.looks == 3:
                time.sleep(2 * self.ttl)
            return super().look()

    waiter, started = Blind(store, ttl=1.0, poll=0.05, on_lost=lambda: None), time.monotonic()
    assert waiter.acquire(is_done=lambda: False, on_wait=lambda reason: None)
    assert time.monotonic() - started > 3 * waiter.ttl
    waiter.release()
