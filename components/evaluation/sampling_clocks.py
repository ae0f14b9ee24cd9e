"""Seconds of sampling on a device, apart from other work in the process.

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
    """Clock of a device for the seconds of sampling."""

    def now(self) -> Any:
        """A moment of the clock, for `since`."""
        ...

    def since(self, started: Any) -> Callable[[], float]:
        """Returns a function for the seconds between `started` and the call; may wait for the device."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Context for work of the thread that does not count."""
        ...


class ProcessorClock:
    """Seconds of all cores and threads of the process, without the work done aside.

    Work aside counts until it has ended.
    """

    def __init__(self) -> None:
        self.besides, self.lock = 0.0, threading.Lock()

    def now(self) -> float:
        """Seconds so far, without the finished work aside."""
        return time.process_time() - self.besides

    def since(self, started: float) -> Callable[[], float]:
        """Seconds from `started` to the call, fixed at the call."""
        return partial(float, self.now() - started)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the seconds of the thread in the context off the clock."""
        started = time.thread_time()
        try:
            yield
        finally:
            with self.lock:
                self.besides += time.thread_time() - started


class StreamClock:
    """Seconds of the current GPU between the work of two calls.

    The time starts with what was asked of the GPU before the first call, and ends with what was asked before the
    second.
    """

    def now(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, started: torch.cuda.Event) -> Callable[[], float]:
        """Seconds of the GPU's stream from `started` to now; the returned function waits for the stream."""
        return partial(_seconds, started, self.now())

    def aside(self) -> AbstractContextManager[None]:
        """Counts nothing off: no work of the processor is on the GPU's stream."""
        return nullcontext()


def _seconds(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    ended.synchronize()
    return started.elapsed_time(ended) / 1000
