"""Object stores of Amazon, Google and Azure: settings, and errors as Python's own.

`connection` knows every store in the form of a `Cloud`. A write-once put is fsspec's `mode="create"`, which must be a
conditional write: `If-None-Match: *` at Amazon (and in every store that speaks S3) and Azure, `ifGenerationMatch=0`, no
generation of the object yet, at Google.
"""

import re
from collections.abc import Callable, Mapping
from http.client import NOT_IMPLEMENTED, PRECONDITION_FAILED
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple

import fsspec

REQUESTS = 3  # times that gcsfs sends one request, with jitter between, before `retried` repeats the transfer
CONNECT_SECONDS, READ_SECONDS = 10, 30  # the second: without a byte
AZURE_LONG = re.compile(r"abfss?://(?P<container>[^/@:]+)@(?P<account>[^/.@:]+)\.[^/]+(?P<path>.*)")


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


def _plain_amazon(error: Exception) -> Exception:
    """Translates an error by HTTP status: s3fs knows Amazon's words, other stores say other words."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    kind = {PRECONDITION_FAILED: FileExistsError, NOT_IMPLEMENTED: NotImplementedError}.get(status)
    return error if kind is None else kind(str(error))


AMAZON = Cloud(
    remedy="set AWS_ACCESS_KEY_ID or give the pod a role",
    options={
        "max_concurrency": 4,  # parts of one large file; s3fs makes them 50 MiB, larger above 10,000 of them
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


def _plain_google(error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):  # its message holds the address of the request
        return FileNotFoundError("no such bucket or object")
    forbidden = type(error) is OSError and str(error).startswith("Forbidden")
    if forbidden or getattr(error, "code", None) in (401, "401"):  # no credentials, or no right
        return PermissionError(str(error).strip().rpartition("\n")[2])
    return error


GOOGLE = Cloud(
    remedy="set GOOGLE_APPLICATION_CREDENTIALS or give the pod a workload identity",
    options={"consistency": "md5"},  # compares the bytes stored with the bytes sent
    filesystem="gcsfs.core.GCSFileSystem",  # fsspec takes an experimental one, which asks by gRPC what kind a bucket is
    extra="gcs",
    loggers=("gcsfs", "google.auth"),
    prepare=_prepare_google,
    plain=_plain_google,
)


def written_short(url: str) -> str | None:
    """Advice for an address with an account in the URL (abfss://container@account.dfs…), else None.

    The account comes from the environment alone, as its key does: a path without it would mean another place.
    """
    address = AZURE_LONG.fullmatch(url)
    if address is None:
        return None
    return f"write az://{address['container']}{address['path']} and set AZURE_STORAGE_ACCOUNT_NAME={address['account']}"


def _prepare_azure(filesystem: fsspec.AbstractFileSystem) -> None:
    """Sets two more tries of a request, after 0 to 1 and 1 to 3 seconds; Azure's default begins with 15."""
    retries = filesystem.service_client._config.retry_policy
    retries.total_retries, retries.initial_backoff, retries.increment_base, retries.random_jitter_range = 2, 0, 2, 1


def _plain_azure(error: Exception) -> Exception:
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ResourceExistsError,
        ResourceNotFoundError,
    )

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # so adlfs wraps errors of `rm`
        return _plain_azure(error.__cause__)
    if isinstance(error, ResourceNotFoundError):
        return FileNotFoundError(str(error))
    if isinstance(error, ResourceExistsError):
        return FileExistsError(str(error))
    denied = isinstance(error, HttpResponseError) and error.status_code in (401, 403)
    if denied or isinstance(error, ClientAuthenticationError):
        return PermissionError(str(error))
    return error


AZURE = Cloud(
    remedy="set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a key or an identity of the pod",
    options={"max_concurrency": 4},  # blocks of one large file, 4 MiB each
    extra="azure",
    loggers=("azure",),
    prepare=_prepare_azure,
    plain=_plain_azure,
)
