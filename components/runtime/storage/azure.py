"""Azure Blob Storage by adlfs: a conditional put is `If-None-Match: *`."""

import re

import fsspec

from components.runtime.storage.cloud import Cloud

LONG = re.compile(r"abfss?://(?P<container>[^/@:]+)@(?P<account>[^/.@:]+)\.[^/]+(?P<path>.*)")


def written_short(url: str) -> str | None:
    """How an address with the account in it (abfss://container@account.dfs…) is given here; None for any other.

    The account comes from the environment alone, as its key does: a path without it would mean another place.
    """
    found = LONG.fullmatch(url)
    if found is None:
        return None
    return f"write az://{found['container']}{found['path']} and set AZURE_STORAGE_ACCOUNT_NAME={found['account']}"


def _prepare(filesystem: fsspec.AbstractFileSystem) -> None:
    """Two more tries of one request, after 0 to 1 and 1 to 3 seconds: of themselves they would begin with 15."""
    retries = filesystem.service_client._config.retry_policy
    retries.total_retries, retries.initial_backoff, retries.increment_base, retries.random_jitter_range = 2, 0, 2, 1


def _plain(error: Exception) -> Exception:
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ResourceExistsError,
        ResourceNotFoundError,
    )

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # so adlfs wraps them in `rm`
        return _plain(error.__cause__)
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
    prepare=_prepare,
    plain=_plain,
)
