"""A folder over HTTP, by a server that counts the bytes of the files that it sends."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.waiting import in_thread


class CountedFiles(NamedTuple):
    url: str
    sent: list[int]  # bytes of each body


@contextmanager
def counted_files(folder: Path) -> Iterator[CountedFiles]:
    sent: list[int] = []

    class Counting(SimpleHTTPRequestHandler):
        def copyfile(self, source: Any, outputfile: Any) -> None:
            data = source.read()
            sent.append(len(data))  # before the client has it all
            outputfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(folder)))
    with in_thread(server):
        yield CountedFiles(f"http://127.0.0.1:{server.server_port}", sent)
