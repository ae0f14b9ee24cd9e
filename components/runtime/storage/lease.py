"""The lease of a stage, for a single driver at a time: a heartbeat in numbered files of the store.

Each holder owns a generation; taking over means creating the next generation with a write-once put, so two can't win.
Nobody's clock is compared with another's: a waiter takes over when the holder's heartbeat counter has stood still for
`ttl` seconds of the waiter's own monotonic clock, at once when the holder released it or died on this machine.

A holder that stands still for longer (its machine sleeps) knows nothing of it when it goes on. So its stores carry the
generation as a fence, which refuses its writes, deletions and listings from the moment the next generation is there.
What was on its way at that moment arrives: at most a checkpoint under a name with its own generation.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import psutil

from components.runtime.storage.connection import FencedError, shown
from components.runtime.storage.store import Fence, Store, StoreError

TTL = 30.0  # seconds


class Seen(NamedTuple):
    """The state of a lease at some moment."""

    generation: int = 0  # 0: never held yet
    beat: int = 0
    holder: str = ""  # in words; "" if the lease is free, or its holder has died on this machine


class Lease:
    """A lease in a separate folder, acquired inside a stage's task and released in the `finally`.
    `ttl`: seconds without a heartbeat after which a holder counts as dead. `poll`: seconds between two looks of a
    waiter. `on_lost`: called from the heartbeat's thread when another holder took over."""

    def __init__(self, store: Store, *, ttl: float = TTL, poll: float = 2.0, on_lost: Callable[[], None]) -> None:
        self.store, self.ttl, self.poll, self.on_lost = store, ttl, poll, on_lost
        self.generation = 0
        self.owner = {
            "id": uuid.uuid4().hex,
            "host": f"{socket.gethostname()}-{int(psutil.boot_time())}",
            "space": _process_space(),
            "pid": os.getpid(),
            "born": _born(psutil.Process()),
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, is_done: Callable[[], bool], on_wait: Callable[[str], None]) -> bool:
        """Wait for the lease, with a line to `on_wait` each time. Returns False as soon as `is_done()`."""
        seen, since = Seen(generation=-1), (looked := time.monotonic())
        while not is_done():
            now, blind = self.look(), time.monotonic() - looked > self.ttl / 2  # nobody writes while the store is away
            if now != seen or blind:
                seen, since = now, time.monotonic()
            looked = time.monotonic()
            stale = time.monotonic() - since > self.ttl
            if (not seen.holder or stale) and self._take(seen.generation + 1):
                return True
            on_wait(f"another driver ({seen.holder}) works on it" if seen.holder else "the lease")
            time.sleep(self.poll)
        return False

    def look(self) -> Seen:
        """The holder and beat at present. A holder with the same `beat` for `ttl` seconds is dead."""
        generation, state = self._latest()
        if state is None or state["released"] or self._died_here(state):
            return Seen(generation)
        return Seen(generation, state["beat"], f"pid {state['pid']} on {state['host']}")

    def take(self, seen: Seen) -> bool:
        """Take the lease if the state still is `seen`, which the caller judged to be free."""
        return self.look() == seen and self._take(seen.generation + 1)

    @property
    def fence(self) -> Fence:
        """The token for stores of the holder."""
        return Fence(self.store.uri, _name(self.generation))

    def is_lost(self) -> bool:
        """True if another holder took over; False while storage can't be asked."""
        try:
            self.fence.check()
        except (OSError, StoreError) as error:
            return isinstance(error, FencedError)
        return False

    def release(self) -> None:
        """Stop the heartbeat, and let the next driver in at once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(FileNotFoundError):  # the next holder deleted the file before its size was compared
                self._write(beat=-1, released=True)

    def withdraw(self) -> None:
        """Delete the last trace of a released lease, where no work is left."""
        self.store.delete(_name(self.generation))

    def _take(self, generation: int) -> bool:
        if not self.store.write_once(_name(generation), self._state(beat=0, released=False)):
            return False
        self.generation = generation
        for older in range(max(1, generation - 3), generation):
            self.store.delete(_name(older))
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return True

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(self.ttl / 6):
            beat += 1
            try:
                generation, state = self._latest()
                # Another holder's name in this generation: a store, such as Swift, let two writers win at once.
                if generation > self.generation or (state is not None and state["id"] != self.owner["id"]):
                    self.on_lost()
                    return
                self._write(beat=beat, released=False)
            except (OSError, StoreError):
                continue  # the store is away: a waiter sees no heartbeat and takes over after `ttl`

    def _latest(self) -> tuple[int, dict[str, Any] | None]:
        names = [info.path for info in self.store.list() if info.path.endswith(".json")]
        if not names:
            return 0, None
        try:
            return int(names[-1].removesuffix(".json")), json.loads(self.store.read(names[-1]))
        except FileNotFoundError:  # deleted by the next holder between the two calls
            return self._latest()
        except ValueError as error:
            remedy = "delete the file if no driver works on this stage"
            raise StoreError(f"{shown(self.store.url(names[-1]))} can't be used: it is no lease; {remedy}") from error

    def _died_here(self, state: dict[str, Any]) -> bool:
        if any(state.get(name) != self.owner[name] for name in ("host", "space")):  # its pid says nothing here
            return False
        try:
            return _born(psutil.Process(state["pid"])) != state["born"]
        except psutil.NoSuchProcess:
            return True

    def _write(self, *, beat: int, released: bool) -> None:
        self.store.write(_name(self.generation), self._state(beat=beat, released=released))

    def _state(self, *, beat: int, released: bool) -> bytes:
        return json.dumps({**self.owner, "beat": beat, "released": released}).encode()


def _born(process: psutil.Process) -> float:
    """Seconds between the machine's start and the process's: independent of changes of the clock."""
    return round(process.create_time() - psutil.boot_time(), 2)


def _process_space() -> str:
    """Identity of the namespace in which pids count; "" without one. Containers of a host have their own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _name(generation: int) -> str:
    return f"{generation:08d}.json"
