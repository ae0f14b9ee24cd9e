"""How storage is reached: which filesystem serves a URL, and what is tried again before it is an error.

Two layers, both with jitter: botocore repeats a request that failed (503, 500, reset, time-out), and `retried` repeats
the whole transfer where a body broke off or held wrong bytes. s3fs's own loop, which has no jitter, is switched off, so
that attempts do not multiply.
"""

import errno
import re
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

T = TypeVar("T")

ATTEMPTS = 6
DAMAGED_ATTEMPTS = 3  # a file that is wrong at rest does not get better
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
TRANSPORTS = {"aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "httpx2"}  # errors of the network
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")
QUERY = re.compile(r"\?.*$", re.DOTALL)
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "max_concurrency": 4,  # parts of one large file; s3fs makes them 50 MiB, larger above 10,000 of them
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 30,  # seconds without a byte
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "max_attempts": 3},
        },
    }
}


class StoreError(Exception):
    """Storage can't do what was asked; the message names the URL and the remedy in one line."""


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(filesystem, path in it) of a URL. Listings are never cached: other writers' files must be seen.

    fsspec's own settings (`FSSPEC_S3={"config_kwargs": …}`) go before those here.

    Raises StoreError for a protocol that is not known, and for a URL that holds a password, which would end in logs and
    manifests.
    """
    if CREDENTIALS.search(url):
        raise StoreError(f"{shown(url)} holds credentials; give them by the environment or by the machine's role")
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    options = OPTIONS.get(protocol, {}) | fsspec.config.conf.get(protocol, {})
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise StoreError(f"{shown(url)}: {error}; use a local path, s3://bucket/path or another fsspec URL") from error
    if protocol == "s3":
        filesystem.retries = 1
    return filesystem, path


def retried(action: Callable[[], T], url: str) -> T:
    """Run `action` with retries and jitter; what can't get better by waiting is raised at once."""
    retrying = Retrying(
        stop=_enough,
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(_may_get_better),
        reraise=True,
    )
    try:
        return retrying(action)
    except PermissionError as error:
        raise StoreError(
            f"{shown(url)}: access denied ({reason(error)}); check the credentials and the bucket's policy"
        ) from error
    except (*FINAL_ERRORS, StoreError):
        raise
    except Exception as error:
        explained = _explained(error, shown(url))
        if explained is None:
            raise
        raise StoreError(explained) from error


def shown(url: str) -> str:
    """A URL as messages may show it: without a password or a signed query."""
    return QUERY.sub("?…", CREDENTIALS.sub("", url))


def reason(error: BaseException | None) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _may_get_better(error: BaseException) -> bool:
    if isinstance(error, FINAL_ERRORS) or "credential" in type(error).__name__.lower():
        return False
    if isinstance(error, OSError):
        return error.errno not in DISK_FULL
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, StoreError | EOFError) or bool(libraries & TRANSPORTS)


def _enough(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number >= (DAMAGED_ATTEMPTS if isinstance(error, StoreError) else ATTEMPTS)


def _explained(error: Exception, url: str) -> str | None:
    """What the user is told; None where it is no matter of storage."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{url} can't be written ({reason(error)}); make room there (`cascade gc`) and run again"
    if "credential" in type(error).__name__.lower():
        return f"{url}: no credentials found; set AWS_ACCESS_KEY_ID or give the pod a role"
    if _may_get_better(error):
        return f"{url} failed {ATTEMPTS} times: {reason(error)}; check the network and the endpoint"
    return None
