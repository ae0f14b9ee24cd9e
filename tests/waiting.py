"""Waiting for what another thread or process does, and servers in threads."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def eventually(holds: Callable[[], object], seconds: float = 30, pause: float = 0.01) -> bool:
    """Whether `holds` is true before the time is over; asked every 10 ms, or after each pause in seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(pause)
    return bool(holds())


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
