"""API keys: places, names, rotation, and the images of each key.

A key is named by the first digits of its sha256 in the log and in measures, and never shown.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

LOG = logging.getLogger("cascade.serving")
KEYS, KEYS_FILE = "CASCADE_API_KEYS", "CASCADE_API_KEYS_FILE"  # variables of the environment
SHORTEST = 32  # characters
LOOK_SECONDS = 5.0  # between two looks at where keys stand
DIGITS = 12  # of a key's name
MINUTE = 60.0
TakeShare = Callable[[str, int], Awaitable[float]]  # `Rates.take`, on any machine


def read_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the API keys of the environment and of its key file; commas and line ends part them.
    Raises ValueError, without a key in it, for a file that can't be read, and for a key that no header can carry or
    that is short enough to be guessed."""
    places = {KEYS: environment.get(KEYS, "")}
    if file := environment.get(KEYS_FILE):
        try:
            places[KEYS_FILE] = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{KEYS_FILE}: the file can't be read ({type(error).__name__})") from None
    found = list[str]()
    for place, text in places.items():
        keys = [key for part in re.split(r"[,\n]", text) if (key := part.strip())]
        for number, key in enumerate(keys, start=1):
            if not re.fullmatch(r"[!-~]+", key):
                raise ValueError(f"{place}: a key must be of letters, digits and signs of ASCII, without spaces")
            if len(key) < SHORTEST:
                remedy = f"must have at least {SHORTEST}: make one with `openssl rand -hex 32`"
                raise ValueError(f"{place}: key {number} has {len(key)} characters, and {remedy}")
        found += keys
    return tuple(found)


class Keyring:
    """The known keys, read again while the service runs: a changed file needs no restart.
    A key that is gone opens nothing any more; what can't be read leaves the keys as they were, and the log says so."""

    def __init__(self, read: Callable[[], Sequence[str]]) -> None:
        """Reads the keys once. Raises as `read` does."""
        self._read, self._refused = read, ""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in read()]
        self._next = time.monotonic() + LOOK_SECONDS

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, key: str) -> str | None:
        """Returns the name of a key, after a comparison in constant time; None for an unknown key."""
        self._look()
        digest = hashlib.sha256(key.encode()).digest()
        # Every key is looked at, so that the time says nothing of which one was nearly right.
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:DIGITS] if any(fits) else None

    def _look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        try:
            self._digests, refused = [hashlib.sha256(key.encode()).digest() for key in self._read()], ""
        except ValueError as error:
            refused = str(error)
        if refused and refused != self._refused:
            LOG.error("%s; the keys from before go on", refused)
        self._refused = refused


class Rates:
    """The shares of all keys in a process: each is a minute's images when full, and fills up evenly.
    A request for more than a minute's is answered when the share is full, and the next has to wait for all of it (the
    generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, images_minute: float) -> None:
        self._seconds_each = MINUTE / images_minute
        self._full: dict[str, float] = {}  # key -> when its share is full again, by time.monotonic()

    async def take(self, key: str, images: int) -> float:
        """Takes images from a key's share; returns 0, or takes none and returns the seconds until a new try."""
        now, cost = time.monotonic(), images * self._seconds_each
        full = max(self._full.get(key, now), now)
        if (wait := full - now + min(cost, MINUTE) - MINUTE) > 0:
            return wait
        self._full[key] = full + cost
        return 0.0
