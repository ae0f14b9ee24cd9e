"""MLflow's names for this project's objects, and variables for MLflow's client.

This file imports no MLflow, which takes seconds.
"""

from pathlib import PurePosixPath

REGISTRY = "models:/"  # the start of a registered model's address
CANDIDATE, CHAMPION = "candidate", "champion"  # aliases: the version made or used last, and the best
SQLITE = "sqlite:///"  # the start of the address of a database file
SYSTEM = "system/"  # the start of metrics that MLflow's page shows as the machine's load

# Tags of a run; STAGE and KEY are also those of a model's version.
RUN, STAGE, KEY, CACHED, MADE_BY = (f"cascade.{name}" for name in ("run", "stage", "stage_key", "cached", "made_by"))
WORKFLOW = "workflow"  # the parent's value of KEY
CHOSEN = "cascade.chosen_name"  # there if the user named the models of the run, and so takes a name over
DECISION, MODEL_TAG = "cascade.decision", "cascade.model."  # the second with a registered name: its version
DATA = "cascade.data"  # the address of the images; of a registered model too

# Tags of a version.
BEFORE = "cascade.champion_before"  # the number of the champion that it followed
FIGURES = "cascade.figures"  # its measurements, a JSON list, the newest last; a run has its own
REASON = "cascade.promotion"  # why it is the champion, or is not
GIT_COMMIT = "cascade.git_commit"
FILES, FILES_DIGEST = "cascade.files", "cascade.files_sha256"  # the list of its files, and the digest of that list
PLACE = "cascade.artifact"  # the stage's folder
MANIFEST = "cascade.manifest_sha256"  # of what lay there


def registered_name(models: str, *, stage: str | None = None) -> str:
    """Registered name of a run's composed cascade, or with `stage` of a single model."""
    return f"image-cascade-{models}" + (f"-{stage}" if stage else "")


def shown_source(source: str) -> str:
    """A model's source for other people's eyes: a folder's name without the private place."""
    return source if source.startswith(REGISTRY) else PurePosixPath(source.rstrip("/")).name


def environment(*, timeout_s: int = 20, retries: int = 1) -> dict[str, str]:
    """Environment variables of MLflow's client; to be set before the client starts.
    `timeout_s`: limit of one request. `retries`: by MLflow itself; few, for the tracker tries again."""
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
