"""Waiting for what another thread or process does, looking meanwhile, and servers in threads."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil


def eventually(holds: Callable[[], object], seconds: float = 30, pause: float = 0.01) -> bool:
    """Whether `holds` is true before the time is over; asked every 10 ms, or after each pause in seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(pause)
    return bool(holds())


@contextmanager
def watching(look: Callable[[], object], pause: float = 0.02) -> Iterator[None]:
    """Calls a function again and again, in a thread of its own, as long as the context lasts."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(pause):
            with suppress(FileNotFoundError, psutil.NoSuchProcess):  # files and processes come and go
                look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Answering(BaseHTTPRequestHandler):
    """A handler that answers with bytes; tests read what was asked, not the terminal."""

    protocol_version = "HTTP/1.1"  # writers wait for leave to send

    def answer(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@contextmanager
def in_thread(server: Any) -> Iterator[None]:
    """An HTTP server of Python's or werkzeug's that serves meanwhile."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def http_server(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server of this machine that hands requests to `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with in_thread(server):
        yield f"http://127.0.0.1:{server.server_port}"
