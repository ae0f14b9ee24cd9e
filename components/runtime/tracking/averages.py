"""A registered model with another average of its weights, as one more version of its name.

Its stage key is that of the version that it was made of, and the average's length: the same average is registered once.
"""

from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from components.runtime.storage.artifact import Artifact, describe_file
from components.runtime.tracking.registry import GIT_COMMIT, Registered, named_version, register_version
from components.runtime.tracking.runs import KEY, STAGE


def register_average(model_uri: str, folder: Path, *, sigma_rel: float, tracking_uri: str) -> Registered:
    """Register the model in `folder`, an average of `model_uri`, as candidate under the same name.

    Raises ValueError, in one line, if the registry has no such version or can't be reached.
    """
    client, source = MlflowClient(tracking_uri), named_version(model_uri, tracking_uri=tracking_uri)
    try:
        experiment_id = client.get_run(source.run_id).info.experiment_id
        artifact = average_of(source, folder, sigma_rel=sigma_rel)
        return register_version(client, source.name, artifact, experiment_id=experiment_id, run_id=source.run_id)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} is written, but not registered: {reason}") from error


def average_of(source: ModelVersion, folder: Path, *, sigma_rel: float) -> Artifact:
    """The files in `folder` as an artifact of the stage that trained `source`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Artifact(
        kind="model",
        stage=source.tags[STAGE],
        key=f"{source.tags[KEY]}-ema-{sigma_rel:g}",
        files=tuple(describe_file(path, path.relative_to(folder).as_posix()) for path in files),
        metadata={"ema_sigma_rel": sigma_rel},
        provenance={"git_commit": source.tags[GIT_COMMIT]},
        root=str(folder.resolve()),
    )
