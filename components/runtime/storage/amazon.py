"""S3 and all that speaks it, by s3fs, whose errors are Python's own: a conditional put is `If-None-Match: *`."""

from http.client import NOT_IMPLEMENTED, PRECONDITION_FAILED

import fsspec

from components.runtime.storage.cloud import Cloud


def _prepare(filesystem: fsspec.AbstractFileSystem) -> None:
    filesystem.retries = 1  # s3fs's own loop has no jitter; botocore's, below it, has


def _plain(error: Exception) -> Exception:
    """Translates an error by its HTTP status: s3fs goes by Amazon's words, and other stores have their own."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    kind = {PRECONDITION_FAILED: FileExistsError, NOT_IMPLEMENTED: NotImplementedError}.get(status)
    return error if kind is None else kind(str(error))


AMAZON = Cloud(
    remedy="set AWS_ACCESS_KEY_ID or give the pod a role",
    options={
        "max_concurrency": 4,  # parts of one large file; s3fs makes them 50 MiB, larger above 10,000 of them
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 30,  # seconds without a byte
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "max_attempts": 3},
        },
    },
    prepare=_prepare,
    plain=_plain,
)
