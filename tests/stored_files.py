"""Files that go to a store and come back, whatever lies between, and writers that race for one."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from components.runtime.storage.store import Store, in_parallel
from tests.waiting import Answering, http_server


def flip(file: Path) -> None:
    """Change one bit in the middle of a file, and nothing that its folder tells of it."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def assert_bytes_arrive(store: Store, place: Path, *, files: int) -> None:
    """So many files are sent, written, written once, read, listed and fetched, several at a time, by way of `place`."""
    made = {f"{number:03d}.bin": np.random.default_rng(number).bytes(2000 + number) for number in range(files)}
    for name, data in made.items():
        (place / name).write_bytes(data)
    in_parallel(lambda name: store.upload(place / name, f"sent/{name}"), made)
    in_parallel(lambda name: store.write(f"written/{name}", made[name]), made)
    assert all(in_parallel(lambda name: store.write_once(f"once/{name}", made[name]), made))
    assert not store.write_once("once/000.bin", b"another")
    for folder in ("sent", "written", "once"):
        assert in_parallel(lambda name, folder=folder: store.read(f"{folder}/{name}"), made) == [*made.values()]
        assert [info.bytes for info in store.list(folder)] == [len(data) for data in made.values()]
    in_parallel(lambda name: store.download(f"sent/{name}", place / "back", name), made)
    assert all((place / "back" / name).read_bytes() == data for name, data in made.items())


def assert_one_wins(uri: str, *, racers: int, rounds: int, alone: bool = True) -> None:
    """Of processes that write one file at once one wins, whose bytes are there, and the others are told so.

    Args:
        alone: False where a store may let several win; the bytes are those of one of them.
    """
    context = multiprocessing.get_context("forkserver")
    told = (uri, dict(os.environ), rounds, context.Barrier(racers), results := context.Queue())
    writers = [context.Process(target=_race, args=(number, *told)) for number in range(racers)]
    for writer in writers:
        writer.start()
    outcomes = [results.get(timeout=300) for _ in writers]
    for writer in writers:
        writer.join()
    for round_ in range(rounds):
        winners = [number for number, won in outcomes if won[round_]]
        assert winners
        assert len(winners) == 1 or not alone
        assert Store(uri).read(f"manifest-{round_}") in [str(number).encode() for number in winners]


def _race(number: int, uri: str, environment: dict[str, str], rounds: int, gate, results) -> None:
    os.environ.update(environment)  # the server that forks has an older one
    store, won = Store(uri), []
    store.exists("manifest")  # connected before the race
    for round_ in range(rounds):
        gate.wait()
        won.append(store.write_once(f"manifest-{round_}", str(number).encode()))
    results.put((number, won))


@contextmanager
def answering(answer: Callable[[str, int], tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """(address, commands that came) of a server; `answer` gives status and body for a command, and how many of its kind
    came before."""
    came: list[str] = []

    class Handler(Answering):
        def do(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, body = answer(self.command, came.count(self.command))
            came.append(self.command)
            self.answer(body, status)

        do_GET = do_HEAD = do_PUT = do_DELETE = do  # noqa: N815

    with http_server(Handler) as address:
        yield address, came
