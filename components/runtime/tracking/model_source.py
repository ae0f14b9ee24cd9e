"""A trained model wherever it is: in the registry, in storage, or in a folder on disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.models.bundle import DESCRIPTION as MODEL
from components.models.file_list import LIST, check_files
from components.runtime.storage.artifact import Artifact, load_artifact
from components.runtime.storage.store import Store, absolute
from components.runtime.tracking.names import REGISTRY
from components.runtime.tracking.registry import download_model
from components.sampling.cascade import DESCRIPTION


@contextmanager
def local_model(source: str, *, tracking_uri: str | None) -> Iterator[Path]:
    """The folder of a trained model or a cascade; a copy of what is elsewhere is gone afterwards.

    What is registered is compared with its list of files first. Raises ValueError, in one line, if there is none or it
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
    """Whether a model lies there as it is, on this disk."""
    return any((Path(source) / name).is_file() for name in (DESCRIPTION, MODEL))


def packed_around(folder: Path) -> Path | None:
    """The folder with the list of its files that MLflow's copy has around the trained model; None for one alone."""
    around = folder.resolve().parent.parent
    return around if (around / LIST).is_file() else None


def model_artifact(source: str) -> Artifact:
    """The model that a stage left in a folder of storage. Raises ValueError if there is none."""
    artifact = load_artifact(Store(absolute(source)))
    if artifact is None or artifact.kind != "model":
        raise ValueError(f"no model at {source}; give models:/NAME@champion or the folder of a model's stage")
    return artifact
