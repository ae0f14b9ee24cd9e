"""A folder over HTTP, by a server that counts the bytes of the files that it sends."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

from tests.waiting import http_server


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

    with http_server(partial(Counting, directory=str(folder))) as url:
        yield CountedFiles(url, sent)
