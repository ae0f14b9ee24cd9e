"""Laws of storage on OpenStack Swift by its S3 protocol, and on what else answers in words of its own: what counts is
the status."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from components.runtime.storage.artifact import Artifact, commit_artifact, describe
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import Store
from tests.emulators import in_environment, new_bucket, swift_server
from tests.stored_files import answering, assert_bytes_arrive, assert_one_wins


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket."""
    with swift_server(tmp_path_factory.mktemp("swift")) as settings, in_environment(settings):
        s3fs.S3FileSystem.clear_instance_cache()
        yield new_bucket("s3")
    s3fs.S3FileSystem.clear_instance_cache()


def test_files_arrive_and_are_written_once(swift: str, tmp_path: Path):
    store = Store(f"{swift}/store")
    store.check_writable()
    assert_bytes_arrive(store, tmp_path, files=3)
    store.delete_folder("once")
    assert store.list("once") == []


def test_of_racing_writers_the_losers_are_told(swift: str):
    """Swift looks whether there is a file before it writes one: of writers within the same milliseconds several win."""
    assert_one_wins(f"{swift}/race", racers=4, rounds=4, alone=False)


def test_whoever_comes_later_adopts(swift: str):
    store = Store(f"{swift}/stage")
    first, second = (
        Artifact(kind="model", stage="base", key="k", files=(describe(data, "a.bin"),)) for data in (b"1", b"2")
    )
    assert commit_artifact(store, first).files == first.files
    assert commit_artifact(store, second).files == first.files


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


def test_a_store_without_conditional_writes_is_refused_before_a_run():
    """As Swift before 2.36 answers, and as a server does that knows no such header."""
    words = b"<Error><Code>NotImplemented</Code><Message>Conditional object PUTs are not supported.</Message></Error>"
    with (
        writing((501, words)) as came,
        pytest.raises(StoreError, match=r"this store can't do that .*Conditional object PUTs are not supported"),
    ):
        Store("s3://bucket").check_writable()
    assert came.count("PUT") == 1
    with writing((200, b"")), pytest.raises(StoreError, match="s3://bucket has no conditional writes"):
        Store("s3://bucket").check_writable()
