"""The environment variables that MLflow's client needs; it can be set up in no other way."""


def environment(*, timeout_s: int = 20, retries: int = 1) -> dict[str, str]:
    """Variables for the process that tracks, to be set by the caller before it starts.

    Args:
        timeout_s: how long one request may take; an MLflow that is away is noticed within it.
        retries: of MLflow's own; few, for the tracker tries again by itself.
    """
    return {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
