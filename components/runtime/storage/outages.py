"""Outages of stores: how long a store is waited for, and the words meanwhile.

A process knows one outage of a store: it begins with the first request without an answer, and ends with the next
answer. So all that wait in a process give up together and name the first cause, and whatever comes after that, such as
the release of a lease, tries once. Workers tell the recorder of their run, a named actor, that they wait.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from components.configuration.usage import UsageError

logger = logging.getLogger("cascade")
SETTING = "CASCADE_OUTAGE_SECONDS"  # 0: a few tries within seconds
RUN_SECONDS = "900"  # of a run that is told nothing else
FIRST_WORD, NEXT_WORD = 5.0, 15.0  # seconds: of an outage, and between two words about it
RECORDER = "cascade-recorder"  # name of the actor
GONE = " was away for "  # in the line of a failure that ends a run
# Set where nobody waits any more for what a thread does: it makes no further try.
given_up: ContextVar[threading.Event] = ContextVar("given_up", default=threading.Event())  # noqa: B039 - this one is never set


@dataclass
class Outage:
    """A store without an answer."""

    cause: str  # the first
    since: float  # by time.monotonic
    said: float = 0.0  # when the last word about it was said; 0: never

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


_outages: dict[str, Outage] = {}  # by store
_lock = threading.Lock()


def patience() -> float:
    """Seconds that a store may be away, by the environment.
    Raises UsageError, in one line, for no such number."""
    given = os.environ.get(SETTING, "0")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{SETTING}={given}: write how many seconds a store may be away; {RUN_SECONDS} where unset")
    return seconds


@contextmanager
def hurried() -> Iterator[None]:
    """Inside, the calling thread makes a single try and waits for no store."""
    (given := threading.Event()).set()
    token = given_up.set(given)
    try:
        yield
    finally:
        given_up.reset(token)


def unanswered(store: str, cause: str, *, since: float | None = None) -> Outage:
    """The outage of a store, which begins unless it is known; says now and then that it is waited for.
    `since`: when the request was sent, by `time.monotonic`; None: now."""
    with _lock:
        outage = _outages.setdefault(store, Outage(cause, since=since or time.monotonic()))
        due = outage.seconds >= FIRST_WORD and time.monotonic() - outage.said >= NEXT_WORD
        if due:
            outage.said = time.monotonic()
    if due:
        away, until = minutes(outage.seconds), minutes(patience())
        _say(store, f"store {store} away for {away}, waiting until {until}: {outage.cause}", ended=False)
    return outage


def answered(store: str) -> None:
    """End the outage of a store, if any."""
    if not _outages:
        return
    with _lock:
        outage = _outages.pop(store, None)
    if outage is not None and outage.said:
        _say(store, f"store {store}{GONE}{minutes(outage.seconds)}: {outage.cause}", ended=True)


def minutes(seconds: float) -> str:
    """130 -> `2:10`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _say(store: str, line: str, *, ended: bool) -> None:
    logger.warning("%s", line)
    ray = sys.modules.get("ray")  # no laptop needs it to read a file
    if ray is not None and ray.is_initialized():
        with suppress(Exception):  # no recorder, or none any more: the line is in the log
            ray.get_actor(RECORDER).waits.remote(store, line, ended=ended)
