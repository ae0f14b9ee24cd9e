"""Opens a trained model in the registry, storage or disk, and registers averages of weights.

The stage key of an average is the key of its source version with the average's length: the same average is registered
once.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from components.models.bundle import DESCRIPTION as MODEL
from components.models.file_list import LIST, check_files
from components.runtime.storage.artifact import Artifact, describe_file, load_artifact
from components.runtime.storage.store import Store, absolute
from components.runtime.tracking.names import GIT_COMMIT, KEY, REGISTRY, STAGE
from components.runtime.tracking.registry import Registered, download_model, named_version, register_version
from components.sampling.cascade import DESCRIPTION


@contextmanager
def local_model(source: str, *, tracking_uri: str | None) -> Iterator[Path]:
    """The folder of a trained model or a cascade; a downloaded copy is removed afterwards.

    A registered model is compared with its list of files first. Raises ValueError, in one line, if there is none or it
    differs; StoreError and ArtifactError as storage does.
    """
    if source.startswith(REGISTRY):
        with tempfile.TemporaryDirectory(prefix="cascade-model-") as folder:
            yield download_model(source, Path(folder), tracking_uri=registry_of(source, tracking_uri))
    elif is_model_folder(source):
        if (packed := packed_around(Path(source))) is not None:
            check_files(packed, source)
        yield Path(source)
    else:
        with model_artifact(source).local_copy() as folder:
            yield folder


def registry_of(source: str, tracking_uri: str | None) -> str:
    """Raises ValueError where none is known."""
    if tracking_uri is None:
        raise ValueError(f"{source} is in a registry: name it with --tracking")
    return tracking_uri


def is_model_folder(source: str) -> bool:
    """True if `source` is a folder of the local disk with a trained model."""
    return any((Path(source) / name).is_file() for name in (DESCRIPTION, MODEL))


def packed_around(folder: Path) -> Path | None:
    """The folder of MLflow's copy around a trained model, with the list of files; None for a model alone."""
    around = folder.resolve().parent.parent
    return around if (around / LIST).is_file() else None


def model_artifact(source: str) -> Artifact:
    """The artifact of a model in a folder of storage. Raises ValueError for a folder without a model."""
    artifact = load_artifact(Store(absolute(source)))
    if artifact is None or artifact.kind != "model":
        raise ValueError(f"no model at {source}; give models:/NAME@champion or the folder of a model's stage")
    return artifact


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
    """The files in `folder` as an artifact of the stage behind `source`."""
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
