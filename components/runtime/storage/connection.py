"""Connections to storage: the filesystem of a URL, retries, errors of a line.

Two layers of retries, both with jitter: a cloud's own client sends a request up to three times (503, 500, reset,
time-out), within seconds; `retried` repeats the whole transfer where a body broke off or held wrong bytes, and it alone
waits for a store that is away (`outages.py`). A write-once put is fsspec's `mode="create"`, which must be a conditional
write: `If-None-Match: *` by S3 and Azure, `ifGenerationMatch=0` by Google.
"""

import errno
import logging
import re
import socket
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple, TypeVar

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, sleep_using_event, wait_random_exponential

from components.runtime.storage import outages

T = TypeVar("T")
Transfer = Callable[[fsspec.AbstractFileSystem, str], T]  # of a file system and a path there

ATTEMPTS = 6
DAMAGED_ATTEMPTS = 3  # a file that is wrong at rest does not get better
REQUESTS = 3  # times that gcsfs sends one request before `retried` repeats the transfer
CONNECT_SECONDS, READ_SECONDS = 10, 30  # the second: without a byte
SILENT_SECONDS = 180.0  # for which a client may try on by itself before it says that there is no answer
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
# Libraries whose errors are the network's.
TRANSPORTS = {"aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "fsspec", "gcsfs", "google"}
TRANSPORTS |= {"httpx2", "requests"}
LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
ON_THE_WAY = ("SHA256Mismatch", "BadDigest", "IncompleteBody", "RequestTimeout")  # 400 by S3: send it again
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")
QUERY = re.compile(r"\?.*$", re.DOTALL)
AZURE_LONG = re.compile(r"abfss?://(?P<container>[^/@:]+)@(?P<account>[^/.@:]+)\.[^/]+(?P<path>.*)")


class StoreError(Exception):
    """Storage refused or failed an operation; the message names the URL and the remedy on a line."""


class AwayError(StoreError):
    """A store gave no answer for as long as it is waited for; the message has the first cause."""


class FencedError(StoreError):
    """A writer's lease is another's by now: what it writes, lists or deletes would harm that one's work."""


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
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    filesystem.retries = 1  # s3fs's own loop has no jitter; botocore's, below it, has
    filesystem.config_kwargs = {"connector_args": {"socket_factory": _impatient_socket}, **filesystem.config_kwargs}
    if filesystem.session is None:
        filesystem.session = AioSession(**filesystem.kwargs)
        handler: Any = add_expect_header  # with it a write waits without end for a "100 Continue"
        filesystem.session.unregister("before-call.s3", handler)


def _impatient_socket(address: tuple[Any, ...]) -> socket.socket:
    """Makes a socket that breaks off where nothing is taken: no time-out of the client covers that."""
    made = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * READ_SECONDS))
    return made


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
    kinds: dict[int | None, type[Exception]] = {
        HTTPStatus.UNAUTHORIZED: PermissionError,
        HTTPStatus.FORBIDDEN: PermissionError,
        HTTPStatus.PRECONDITION_FAILED: FileExistsError,
        HTTPStatus.NOT_IMPLEMENTED: NotImplementedError,
    }
    kind = kinds.get(_status(error))
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
    if "::" in url:
        raise StoreError(f"{shown(url)} holds ::, which chains addresses: rename the folder")
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
    """Run `action` with retries and jitter, and wait for a store that is away.
    Permanent errors are raised at once. Raises StoreError with a remedy for a cause in storage or on the network, and
    any other error as it is."""
    cloud, store, tries = _cloud(url)[1], "/".join(shown(url).split("/", 3)[:3]), 0
    began: float | None = None  # of the outage, as this call sees it: others may have an answer now and then
    asked = time.monotonic()  # when the last try began

    def plainly() -> T:
        """Raises a cloud's errors in Python's own terms."""
        nonlocal asked
        asked = time.monotonic()
        try:
            result = action()
        except Exception as error:
            plain = error if isinstance(error, StoreError) else cloud.plain(error)
            if not _is_away(plain):
                outages.answered(store)
            if plain is error:
                raise
            raise plain from error
        outages.answered(store)
        return result

    def enough(state: RetryCallState) -> bool:
        nonlocal began, tries
        error, tries = state.outcome.exception() if state.outcome else None, state.attempt_number
        if error is not None and _is_away(error) and (most := outages.patience()):
            began = began or max(asked, time.monotonic() - SILENT_SECONDS)
            outage = outages.unanswered(store, shown(reason(error)), since=began)
            given_up = max(outage.seconds, time.monotonic() - began) >= most
        else:
            given_up = tries >= (DAMAGED_ATTEMPTS if isinstance(error, StoreError) else ATTEMPTS)
        return given_up or outages.given_up.get().is_set()

    wait = wait_random_exponential(multiplier=0.2, max=10)
    retrying = Retrying(
        stop=enough,
        wait=wait,
        retry=retry_if_exception(_may_get_better),
        sleep=sleep_using_event(outages.given_up.get()),
        reraise=True,
    )
    try:
        return retrying(plainly)
    except PermissionError as error:
        remedy = "check the credentials and the bucket's policy"
        raise StoreError(f"{shown(url)}: access denied ({reason(error)}); {remedy}") from error
    except (*FINAL_ERRORS, StoreError):
        raise
    except Exception as error:
        if began is not None and _is_away(error):
            outage = outages.unanswered(store, shown(reason(error)))
            away = f"{shown(url)}{outages.GONE}{outages.minutes(outage.seconds)}: {outage.cause}"
            raise AwayError(f"{away}; check the network and the endpoint") from error
        if (explained := _explained(error, cloud, tries)) is None:
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


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, or of the client's error below it, where there was an answer."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):  # botocore's
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # Of aiohttp, Azure, requests and httpx, and of Google: aiohttp's errors of half a body have a code of 400 too.
        places = ((each, "status"), (each, "status_code"), (answer, "status_code"))
        places += ((each, "code"),) if type(each).__module__.startswith("gcsfs.") else ()
        for owner, name in places:
            if str(status := getattr(owner, name, None)).isdecimal():
                return int(str(status))
    return None


def _is_final(error: BaseException) -> bool:
    return isinstance(error, (*FINAL_ERRORS, AwayError, FencedError)) or "credential" in type(error).__name__.lower()


def _is_away(error: BaseException) -> bool:
    """True for an error of a store that gives no answer, or says that it can't give one now."""
    if _is_final(error) or isinstance(error, StoreError):
        return False
    if status := _status(error):
        busy = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR)
        return status in busy or status > HTTPStatus.NOT_IMPLEMENTED
    return isinstance(error, ConnectionError | TimeoutError) or _is_transport(error)


def _is_transport(error: BaseException) -> bool:
    return bool({kind.__module__.partition(".")[0] for kind in type(error).__mro__} & TRANSPORTS)


def _is_refused(error: BaseException) -> bool:
    """True for an answer that another try does not change."""
    client_error = HTTPStatus.BAD_REQUEST <= (status := _status(error) or 0) < HTTPStatus.INTERNAL_SERVER_ERROR
    return client_error and status not in LATER and not any(word in f"{error} {error.__cause__}" for word in ON_THE_WAY)


def _may_get_better(error: BaseException) -> bool:
    if _is_final(error) or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return False
    return not _is_refused(error) and (isinstance(error, StoreError | EOFError | OSError) or _is_transport(error))


def _explained(error: Exception, cloud: Cloud, tries: int) -> str | None:
    """The message for the user, after the address; None for an error unrelated to storage."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f" can't be written ({reason(error)}); make room there (`cascade gc`) and run again"
    if "credential" in type(error).__name__.lower():
        return f": no credentials found; {cloud.remedy}"
    if isinstance(error, NotImplementedError):
        return f": this store can't do that ({reason(error)}); use another, or a newer version of it"
    if _is_refused(error):
        return f": refused ({reason(error)}); check the address, the endpoint and its region"
    if _may_get_better(error):
        return f" failed {tries} times: {reason(error)}; check the network and the endpoint"
    return None
