"""How storage is reached: which filesystem serves a URL, and what is tried again before it is an error.

Two layers, both with jitter: a cloud's own client sends a request up to three times (503, 500, reset, time-out), and
`retried` repeats the whole transfer where a body broke off or held wrong bytes. What a cloud needs for that stands in
its file (`amazon`, `google`, `azure`), in one form (`cloud`).
"""

import errno
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from components.runtime.storage.amazon import AMAZON
from components.runtime.storage.azure import AZURE, written_short
from components.runtime.storage.cloud import Cloud
from components.runtime.storage.google import GOOGLE

T = TypeVar("T")

ATTEMPTS = 6
DAMAGED_ATTEMPTS = 3  # a file that is wrong at rest does not get better
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
# Libraries whose errors are the network's.
TRANSPORTS = {
    "aiobotocore",
    "aiohttp",
    "asyncio",
    "azure",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "httpx2",
    "requests",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")
QUERY = re.compile(r"\?.*$", re.DOTALL)
OTHERS = Cloud(remedy="use a local path, s3://bucket/path or another fsspec URL")
CLOUDS = {
    "s3": AMAZON,
    "s3a": AMAZON,
    "gs": GOOGLE,
    "gcs": GOOGLE,
    "az": AZURE,
    "abfs": AZURE,
    "abfss": AZURE,
    "hf": OTHERS._replace(extra="hub"),
}


class StoreError(Exception):
    """Storage can't do what was asked; the message names the URL and the remedy in one line."""


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(filesystem, path in it) of a URL. Listings are never cached: other writers' files must be seen.

    fsspec's own settings (`FSSPEC_S3={"config_kwargs": …}`) go before those here.

    Raises StoreError for a protocol that is not known or whose package is missing, and for a URL that holds a password,
    which would end in logs and manifests.
    """
    if short := written_short(url):
        raise StoreError(f"{url} names its account; {short}")
    if CREDENTIALS.search(url):
        raise StoreError(f"{shown(url)} holds credentials; give them by the environment or by the machine's role")
    protocol = _protocol(url)
    cloud = CLOUDS.get(protocol, OTHERS)
    for name in cloud.loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if cloud.filesystem:
        fsspec.register_implementation(protocol, cloud.filesystem, clobber=True)
    options = {**cloud.options, **fsspec.config.conf.get(protocol, {})}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        missing = isinstance(error, ImportError)  # fsspec says what to install
        why = f": {reason(error if missing else error.__cause__ or error)}; {cloud.remedy}"
        if cloud.extra and missing:
            why = f" needs the extra {cloud.extra}: pip install 'image-cascade[{cloud.extra}]'"
        raise StoreError(shown(url) + why) from error
    cloud.prepare(filesystem)
    return filesystem, path


def files_below(filesystem: fsspec.AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """Path -> what is known of it, for all files below `root`, or for `root` alone where it is a file."""
    found = filesystem.find(root, detail=True)
    return found if isinstance(found, dict) else {name: filesystem.info(name) for name in found}  # adlfs, of a file


def retried(action: Callable[[], T], url: str) -> T:
    """Run `action` with retries and jitter; what can't get better by waiting is raised at once."""
    cloud = CLOUDS.get(_protocol(url), OTHERS)
    retrying = Retrying(
        stop=_enough,
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(_may_get_better),
        reraise=True,
    )
    try:
        return retrying(_plainly, action, cloud)
    except PermissionError as error:
        raise StoreError(
            f"{shown(url)}: access denied ({reason(error)}); check the credentials and the bucket's policy"
        ) from error
    except (*FINAL_ERRORS, StoreError):
        raise
    except Exception as error:
        explained = _explained(error, shown(url), cloud)
        if explained is None:
            raise
        raise StoreError(explained) from error


def shown(url: str) -> str:
    """A URL as messages may show it: without a password or a signed query."""
    return QUERY.sub("?…", CREDENTIALS.sub("", url))


def reason(error: BaseException | None) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _protocol(url: str) -> str:
    return fsspec.core.split_protocol(url)[0] or "file"


def _plainly(action: Callable[[], T], cloud: Cloud) -> T:
    """`action`, with a cloud's errors in Python's own terms."""
    try:
        return action()
    except StoreError:
        raise
    except Exception as error:
        plain = cloud.plain(error)
        if plain is error:
            raise
        raise plain from error


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


def _explained(error: Exception, url: str, cloud: Cloud) -> str | None:
    """What the user is told; None where it is no matter of storage."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{url} can't be written ({reason(error)}); make room there (`cascade gc`) and run again"
    if "credential" in type(error).__name__.lower():
        return f"{url}: no credentials found; {cloud.remedy}"
    if isinstance(error, NotImplementedError):
        return f"{url}: this store can't do that ({reason(error)}); use another, or a newer version of it"
    if _may_get_better(error):
        return f"{url} failed {ATTEMPTS} times: {reason(error)}; check the network and the endpoint"
    return None
