"""Google Cloud Storage by gcsfs: a conditional put is `ifGenerationMatch=0`, no generation of the object yet."""

from types import MethodType

import fsspec

from components.runtime.storage.cloud import Cloud

REQUESTS = 3  # times that gcsfs sends one request, with jitter between, before `retried` repeats the transfer
CONNECT_SECONDS, READ_SECONDS = 10, 30  # the second: without a byte


def _prepare(filesystem: fsspec.AbstractFileSystem) -> None:
    import aiohttp
    from gcsfs.retry import retry_request

    if "_request" not in vars(filesystem):
        once = type(filesystem)._request.__wrapped__
        filesystem._request = MethodType(retry_request(retries=REQUESTS)(once), filesystem)
    if filesystem.requests_timeout is None:
        filesystem.requests_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        )


def _plain(error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):  # it holds the address of the request
        return FileNotFoundError("no such bucket or object")
    forbidden = type(error) is OSError and str(error).startswith("Forbidden")
    if forbidden or getattr(error, "code", None) in (401, "401"):  # nobody, or who must not
        return PermissionError(str(error).strip().rpartition("\n")[2])
    return error


GOOGLE = Cloud(
    remedy="set GOOGLE_APPLICATION_CREDENTIALS or give the pod a workload identity",
    options={"consistency": "md5"},  # what arrived is compared with what was sent
    filesystem="gcsfs.core.GCSFileSystem",  # fsspec takes an experimental one, which asks by gRPC what kind a bucket is
    extra="gcs",
    loggers=("gcsfs", "google.auth"),
    prepare=_prepare,
    plain=_plain,
)
