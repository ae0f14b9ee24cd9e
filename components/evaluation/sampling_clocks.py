"""Seconds that images take on a device, whatever else goes on in the process.

Cores are shared with other processes, and their own time is not; a GPU's time is on no core.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch


class Clock(Protocol):
    def now(self) -> Any: ...

    def since(self, started: Any) -> Callable[[], float]:
        """What says how many seconds were between `started` and this call; it may wait for the device."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Inside, this thread does what does not count."""
        ...


class ProcessorClock:
    """Of all cores and threads of this process, but for what was done aside; that counts until it has ended."""

    def __init__(self) -> None:
        self.besides, self.lock = 0.0, threading.Lock()

    def now(self) -> float:
        return time.process_time() - self.besides

    def since(self, started: float) -> Callable[[], float]:
        return partial(float, self.now() - started)

    @contextmanager
    def aside(self) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            with self.lock:
                self.besides += time.thread_time() - started


class StreamClock:
    """Of the current GPU, from what it was asked for before the first call to what before the second."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, started: torch.cuda.Event) -> Callable[[], float]:
        return partial(_seconds, started, self.now())

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


def _seconds(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    ended.synchronize()
    return started.elapsed_time(ended) / 1000
