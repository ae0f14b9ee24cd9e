"""Connections to storage: the filesystem of a URL, retries, errors of a line, room on local disks.

Two layers of retries, both with jitter: a cloud's own client sends a request up to three times (503, 500, reset,
time-out), and `retried` repeats the whole transfer where a body broke off or held wrong bytes. `clouds` holds the
settings of each vendor.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from components.runtime.storage.clouds import AMAZON, AZURE, GOOGLE, Cloud, written_short

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
    """Storage refused or failed an operation; the message names the URL and the remedy on a line."""


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the filesystem of a URL, and the path there.

    Listings are never cached: other writers' files must be seen. fsspec's own settings
    (`FSSPEC_S3={"config_kwargs": …}`) go before those here.

    Raises StoreError for an unknown protocol, a missing package, and for a URL that holds a password, which would end
    in logs and manifests.
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
    """Maps each path below `root` to its `info`; for a file, the path of `root` alone."""
    infos = filesystem.find(root, detail=True)
    return infos if isinstance(infos, dict) else {name: filesystem.info(name) for name in infos}  # adlfs, of a file


def retried(action: Callable[[], T], url: str) -> T:
    """Run `action` with retries and jitter; permanent errors are raised at once.

    Raises the error of the action where callers tell files apart by it (missing, existing, no folder), StoreError with
    a remedy for a cause in storage or on the network, and any other error as it is.
    """
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
    """A URL for messages, without a password or a signed query."""
    return QUERY.sub("?…", CREDENTIALS.sub("", url))


def reason(error: BaseException | None) -> str:
    """The first line of an error, at most 200 characters; the type's name for an empty text."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _protocol(url: str) -> str:
    return fsspec.core.split_protocol(url)[0] or "file"


def _plainly(action: Callable[[], T], cloud: Cloud) -> T:
    """Runs `action` and raises a cloud's errors in Python's own terms."""
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
    """The message for the user; None for an error unrelated to storage."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{url} can't be written ({reason(error)}); make room there (`cascade gc`) and run again"
    if "credential" in type(error).__name__.lower():
        return f"{url}: no credentials found; {cloud.remedy}"
    if isinstance(error, NotImplementedError):
        return f"{url}: this store can't do that ({reason(error)}); use another, or a newer version of it"
    if _may_get_better(error):
        return f"{url} failed {ATTEMPTS} times: {reason(error)}; check the network and the endpoint"
    return None


def check_room(needed: Mapping[str, int], *, purpose: str) -> None:
    """Raise StoreError, in a line, if a disk lacks room. Object stores have no such limit.

    Args:
        needed: URL of a folder, which need not exist yet -> bytes that will be written below it. Folders on one disk
            need the sum; URLs of other stores are passed over.
        purpose: subject of the message, such as "the checkpoints".
    """
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for url, count in needed.items():
        if is_local(url) and count:
            path = Path(connect(url)[1])
            folder = next(folder for folder in (path, *path.parents) if folder.exists())
            disks.setdefault(os.stat(folder).st_dev, []).append((folder, url, count))
    for places in disks.values():
        total, free = sum(count for _, _, count in places), shutil.disk_usage(places[0][0]).free
        if total > free:
            urls = " and ".join(url for _, url, _ in places)
            raise StoreError(
                f"{purpose} need {readable_bytes(total)} in {urls}, where {readable_bytes(free)} are free; make room "
                "(`cascade gc`), or name another place (--storage or --out; TMPDIR for a temporary folder)"
            )


def is_local(url: str) -> bool:
    """True for a folder on a disk of the calling machine, mounted folders included."""
    return isinstance(connect(url)[0], LocalFileSystem)


def readable_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
