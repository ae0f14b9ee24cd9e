"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def eventually(holds: Callable[[], object], seconds: float = 30, pause: float = 0.01) -> bool:
    """Whether `holds` is true before the time is over; asked every 10 ms, or after each pause in seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(pause)
    return bool(holds())
