"""Connections to storage: the filesystem of a URL, retries, errors of a line, room on local disks.

Two layers of retries, both with jitter: a cloud's own client sends a request up to three times (503, 500, reset,
time-out), and `retried` repeats the whole transfer where a body broke off or held wrong bytes. A write-once put is
fsspec's `mode="create"`, which must be a conditional write: `If-None-Match: *` by S3 and Azure, `ifGenerationMatch=0`
by Google.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from http.client import NOT_IMPLEMENTED, PRECONDITION_FAILED
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

T = TypeVar("T")
Transfer = Callable[[fsspec.AbstractFileSystem, str], T]  # of a file system and a path there

ATTEMPTS = 6
DAMAGED_ATTEMPTS = 3  # a file that is wrong at rest does not get better
REQUESTS = 3  # times that gcsfs sends one request before `retried` repeats the transfer
CONNECT_SECONDS, READ_SECONDS = 10, 30  # the second: without a byte
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
# Libraries whose errors are the network's.
TRANSPORTS = {"aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "fsspec", "gcsfs", "google"}
TRANSPORTS |= {"httpx2", "requests"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")
QUERY = re.compile(r"\?.*$", re.DOTALL)
AZURE_LONG = re.compile(r"abfss?://(?P<container>[^/@:]+)@(?P<account>[^/.@:]+)\.[^/]+(?P<path>.*)")


class StoreError(Exception):
    """Storage refused or failed an operation; the message names the URL and the remedy on a line."""


class Cloud(NamedTuple):
    """A kind of object store, described as far as fsspec's interface does not cover the differences."""

    remedy: str  # advice where nobody can sign in
    options: Mapping[str, Any] = MappingProxyType({})  # of the file system; a user's FSSPEC_… go before them
    filesystem: str | None = None  # its class, where fsspec would take another one
    extra: str | None = None  # of this package, which brings the file system; None: always installed
    loggers: tuple[str, ...] = ()  # log, some with a traceback, errors that are retried or raised anyway
    # Bounds the retries of the client; may be called again on the same file system.
    prepare: Callable[[fsspec.AbstractFileSystem], None] = lambda filesystem: None
    plain: Callable[[Exception], Exception] = lambda error: error  # Python's own error of the same meaning, if any


def _prepare_amazon(filesystem: fsspec.AbstractFileSystem) -> None:
    filesystem.retries = 1  # s3fs's own loop has no jitter; botocore's, below it, has


def _prepare_google(filesystem: fsspec.AbstractFileSystem) -> None:
    import aiohttp
    from gcsfs.retry import retry_request

    if "_request" not in vars(filesystem):
        once = type(filesystem)._request.__wrapped__
        filesystem._request = MethodType(retry_request(retries=REQUESTS)(once), filesystem)
    if filesystem.requests_timeout is None:
        filesystem.requests_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        )


def _prepare_azure(filesystem: fsspec.AbstractFileSystem) -> None:
    """Sets two more tries of a request, after 0 to 1 and 1 to 3 seconds; Azure's default begins with 15."""
    retries = filesystem.service_client._config.retry_policy
    retries.total_retries, retries.initial_backoff, retries.increment_base, retries.random_jitter_range = 2, 0, 2, 1


def _plain_amazon(error: Exception) -> Exception:
    """Translates an error by HTTP status: s3fs knows Amazon's words, other stores say other words."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    kind = {PRECONDITION_FAILED: FileExistsError, NOT_IMPLEMENTED: NotImplementedError}.get(status)
    return error if kind is None else kind(str(error))


def _plain_google(error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):  # its message holds the address of the request
        return FileNotFoundError("no such bucket or object")
    forbidden = type(error) is OSError and str(error).startswith("Forbidden")
    if forbidden or getattr(error, "code", None) in (401, "401"):  # no credentials, or no right
        return PermissionError(str(error).strip().rpartition("\n")[2])
    return error


def _plain_azure(error: Exception) -> Exception:
    from azure.core import exceptions

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # so adlfs wraps errors of `rm`
        return _plain_azure(error.__cause__)
    if isinstance(error, exceptions.ResourceNotFoundError):
        return FileNotFoundError(str(error))
    if isinstance(error, exceptions.ResourceExistsError):
        return FileExistsError(str(error))
    denied = isinstance(error, exceptions.HttpResponseError) and error.status_code in (401, 403)
    return PermissionError(str(error)) if denied or isinstance(error, exceptions.ClientAuthenticationError) else error


AMAZON = Cloud(
    remedy="set AWS_ACCESS_KEY_ID or give the pod a role",
    options={
        "max_concurrency": 4,  # parts of one large file, 50 MiB each, larger above 10,000
        "config_kwargs": {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "max_attempts": 3},
        },
    },
    prepare=_prepare_amazon,
    plain=_plain_amazon,
)
GOOGLE = Cloud(
    remedy="set GOOGLE_APPLICATION_CREDENTIALS or give the pod a workload identity",
    options={"consistency": "md5"},  # compares the bytes stored with the bytes sent
    filesystem="gcsfs.core.GCSFileSystem",  # fsspec's is experimental, and asks by gRPC
    extra="gcs",
    loggers=("gcsfs", "google.auth"),
    prepare=_prepare_google,
    plain=_plain_google,
)
AZURE = Cloud(
    remedy="set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a key or an identity of the pod",
    options={"max_concurrency": 4},  # blocks of one large file, 4 MiB each
    extra="azure",
    loggers=("azure",),
    prepare=_prepare_azure,
    plain=_plain_azure,
)
OTHERS = Cloud(remedy="use a local path, s3://bucket/path or another fsspec URL")
CLOUDS = dict.fromkeys(("s3", "s3a"), AMAZON) | dict.fromkeys(("gs", "gcs"), GOOGLE)
CLOUDS |= dict.fromkeys(("az", "abfs", "abfss"), AZURE) | {"hf": OTHERS._replace(extra="hub")}


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the filesystem of a URL, and the path there.
    Listings are never cached: other writers' files must be seen. fsspec's own settings (`FSSPEC_S3={"config_kwargs":
    …}`) go before those here. Raises StoreError for an unknown protocol, a missing package, and for a URL with a
    password, which would end in logs and manifests, or an account: a path without it would mean another place."""
    if long := AZURE_LONG.fullmatch(url):
        short, account = f"az://{long['container']}{long['path']}", f"AZURE_STORAGE_ACCOUNT_NAME={long['account']}"
        raise StoreError(f"{url} names its account; write {short} and set {account}")
    if CREDENTIALS.search(url):
        raise StoreError(f"{shown(url)} holds credentials; give them by the environment or by the machine's role")
    protocol, cloud = _cloud(url)
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


def at(url: str, action: Transfer[T]) -> T:
    """Runs `action` on the file system and the path of a URL. Raises as `connect` and `retried`."""
    filesystem, path = connect(url)
    return retried(lambda: action(filesystem, path), url)


def files_below(filesystem: fsspec.AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """Maps each path below `root` to its `info`; for a file, the path of `root` alone."""
    infos = filesystem.find(root, detail=True)
    return infos if isinstance(infos, dict) else {name: filesystem.info(name) for name in infos}  # adlfs, of a file


def retried(action: Callable[[], T], url: str) -> T:
    """Run `action` with retries and jitter; permanent errors are raised at once.
    Raises StoreError with a remedy for a cause in storage or on the network, and any other error as it is."""
    cloud = _cloud(url)[1]

    def plainly() -> T:
        """Raises a cloud's errors in Python's own terms."""
        try:
            return action()
        except Exception as error:
            if isinstance(error, StoreError) or (plain := cloud.plain(error)) is error:
                raise
            raise plain from error

    def enough(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return state.attempt_number >= (DAMAGED_ATTEMPTS if isinstance(error, StoreError) else ATTEMPTS)

    wait = wait_random_exponential(multiplier=0.2, max=10)
    try:
        return Retrying(stop=enough, wait=wait, retry=retry_if_exception(_may_get_better), reraise=True)(plainly)
    except PermissionError as error:
        remedy = "check the credentials and the bucket's policy"
        raise StoreError(f"{shown(url)}: access denied ({reason(error)}); {remedy}") from error
    except (*FINAL_ERRORS, StoreError):
        raise
    except Exception as error:
        if (explained := _explained(error, cloud)) is None:
            raise
        raise StoreError(shown(url) + explained) from error


def shown(url: str) -> str:
    """A URL for messages, without a password or a signed query."""
    return QUERY.sub("?…", CREDENTIALS.sub("", url))


def reason(error: BaseException | None) -> str:
    """The first line of an error, at most 200 characters; the type's name for an empty text."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _cloud(url: str) -> tuple[str, Cloud]:
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    return protocol, CLOUDS.get(protocol, OTHERS)


def _may_get_better(error: BaseException) -> bool:
    if isinstance(error, FINAL_ERRORS) or "credential" in type(error).__name__.lower():
        return False
    if isinstance(error, OSError):
        return error.errno not in DISK_FULL
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, StoreError | EOFError) or bool(libraries & TRANSPORTS)


def _explained(error: Exception, cloud: Cloud) -> str | None:
    """The message for the user, after the address; None for an error unrelated to storage."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f" can't be written ({reason(error)}); make room there (`cascade gc`) and run again"
    if "credential" in type(error).__name__.lower():
        return f": no credentials found; {cloud.remedy}"
    if isinstance(error, NotImplementedError):
        return f": this store can't do that ({reason(error)}); use another, or a newer version of it"
    if _may_get_better(error):
        return f" failed {ATTEMPTS} times: {reason(error)}; check the network and the endpoint"
    return None


def check_room(needed: Mapping[str, int], *, purpose: str) -> None:
    """Raise StoreError, in a line, if a disk lacks room. Object stores have no such limit.
    `needed`: URL of a folder, which need not exist yet -> bytes that will be written below it. Folders on one disk need
    the sum. `purpose`: subject of the message, such as "the checkpoints"."""
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for url, count in needed.items():
        if is_local(url) and count:
            path = Path(connect(url)[1])
            folder = next(folder for folder in (path, *path.parents) if folder.exists())
            disks.setdefault(os.stat(folder).st_dev, []).append((folder, url, count))
    for places in disks.values():
        total, free = sum(count for _, _, count in places), shutil.disk_usage(places[0][0]).free
        if total > free:
            needed_bytes, urls = readable_bytes(total), " and ".join(url for _, url, _ in places)
            remedy = (
                "make room (`cascade gc`), or name another place (--storage or --out; TMPDIR for a temporary folder)"
            )
            raise StoreError(
                f"{purpose} need {needed_bytes} in {urls}, where {readable_bytes(free)} are free; {remedy}"
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
