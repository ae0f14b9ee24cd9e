"""An S3 server in this process that counts the bytes of each object that it sends."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.emulators import in_environment, of_s3
from tests.waiting import in_thread


class CountedS3(NamedTuple):
    """Where it is, and what it has sent."""

    endpoint: str
    sent: Counter[str]  # "bucket/key" -> bytes of bodies, of GET

    def bucket(self, name: str) -> str:
        """URL of a new bucket."""
        s3fs.S3FileSystem(endpoint_url=self.endpoint, skip_instance_cache=True).mkdir(name)
        return f"s3://{name}"

    def take(self) -> dict[str, int]:
        """Bytes of each tar, by its URL, that were sent since the last call."""
        found = {f"s3://{path}": count for path, count in self.sent.items() if path.endswith(".tar")}
        self.sent.clear()
        return found


@contextmanager
def counted_s3() -> Iterator[CountedS3]:
    """The server; its address and keys stand in the environment of this process and of all that it starts meanwhile."""
    moto, sent = DomainDispatcherApplication(create_backend_app), Counter[str]()

    def counting(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body, path = moto(environ, start_response), environ["PATH_INFO"].lstrip("/")
        for part in body:
            if environ["REQUEST_METHOD"] == "GET":
                sent[path] += len(part)  # before the client has it all
            yield part

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it says each request
    server = make_server("127.0.0.1", 0, counting, threaded=True)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with in_thread(server), in_environment(of_s3(endpoint)):
        yield CountedS3(endpoint, sent)
