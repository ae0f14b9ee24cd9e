"""Trained models and composed cascades in MLflow's registry, with the code for running.

A version is known by its stage key (tag `cascade.stage_key`) and registered once. `candidate` names the version made or
used last, `champion` the best (`components.runtime.tracking.promotion`).
"""

import importlib.metadata
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import mlflow.pyfunc
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from components.models.file_list import check_files, digest_of_list, write_list
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.names import (
    CANDIDATE,
    FILES,
    FILES_DIGEST,
    GIT_COMMIT,
    KEY,
    REGISTRY,
    STAGE,
    registered_name,
)
from components.runtime.tracking.packed_code import MODEL_CODE, model_code, pack_code
from components.sampling.answers import example_of
from components.sampling.cascade import DESCRIPTION
from components.sampling.frozen_text import LENGTH

REQUIREMENTS = ("einops", "mlflow", "numpy", "pillow", "pydantic", "safetensors", "tokenizers", "torch")
CODE = ("git_commit", "code")  # of an artifact's provenance: which code made it, module by module
LONGEST_LIST = 60_000  # characters; a tag takes no more on MySQL, and a longer list lies in the model alone
NAMED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))")  # by an alias, or by a version's number
ARTIFACT = "model"  # what the cascade_model calls the folder of the trained model


class Registered(NamedTuple):
    """A version in the registry: the registered name, the number, and the id of the logged model.

    A stage key is registered once under a name, so that a retry finds the same version again.
    """

    name: str
    version: str
    model_id: str


class Named(NamedTuple):
    """The current version of an address."""

    name: str
    version: str
    created: int  # seconds since 1970

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


class Packed(NamedTuple):
    """A local copy of a registered model, with the registered digests."""

    uri: str  # by its version's number
    folder: Path
    digest: str  # of the list of its files
    files: str | None  # the list; None: too long to stand in the registry


def model_name(artifact: Artifact, *, models: str) -> str:
    """The registered name of an artifact: `models` of the run, with the stage if no composed cascade."""
    return registered_name(models, stage=None if DESCRIPTION in artifact.names() else artifact.stage)


def register_version(
    client: MlflowClient, name: str, artifact: Artifact, *, experiment_id: str, run_id: str
) -> Registered:
    """Register a model artifact as candidate, unless the stage key is already registered.

    Args:
        run_id: the run that shows as its source.

    Raises ArtifactError if the stored files differ from the manifest.
    """
    version = find_version(client, name, key=artifact.key)
    if version is None:
        model = find_logged_model(client, experiment_id, key=artifact.key)
        if model is None or not _is_sound(model, str(client.tracking_uri)):
            model = _log_model(client, artifact, experiment_id=experiment_id, run_id=run_id)
        version = _create_version(client, name, artifact, model, run_id=run_id)
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    return Registered(name, str(version.version), version.source.removeprefix("models:/"))


def find_version(client: MlflowClient, name: str, *, key: str) -> ModelVersion | None:
    """The registered version of a stage key, with the list of files; or None."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'")
    listed = [version for version in versions if FILES_DIGEST in version.tags]
    return min(listed, key=lambda version: int(version.version)) if listed else None


def find_logged_model(client: MlflowClient, experiment_id: str, *, key: str) -> LoggedModel | None:
    """The finished logged model of a stage key, or None."""
    models = client.search_logged_models([experiment_id], f"tags.`{KEY}` = '{key}'")
    ready = [model for model in models if model.status == LoggedModelStatus.READY]
    return min(ready, key=lambda model: model.creation_timestamp) if ready else None


def find_named(model_uri: str, *, tracking_uri: str) -> Named:
    """Name, number and time of the version from `named_version`."""
    version = named_version(model_uri, tracking_uri=tracking_uri)
    return Named(version.name, str(version.version), version.creation_timestamp // 1000)


def named_version(model_uri: str, *, tracking_uri: str) -> ModelVersion:
    """The current version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises ValueError, in one line, if the registry has none or can't be reached.
    """
    parts = NAMED.fullmatch(model_uri)
    if parts is None:
        raise ValueError(f"{model_uri} names no version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    client = MlflowClient(tracking_uri)
    with _registry(model_uri, tracking_uri):
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)


def download_model(model_uri: str, folder: Path, *, tracking_uri: str) -> Path:
    """Copy the trained model inside `models:/NAME@ALIAS` into `folder`. Returns the model's folder.

    Raises ValueError, in one line, if the registry has no such model or can't be reached, and for a copy that is not
    as it was registered.
    """
    packed = download_packed(model_uri, folder, tracking_uri=tracking_uri)
    check_files(packed.folder, packed.uri, digest=packed.digest, text=packed.files)
    return trained_model(packed.folder)


def download_packed(model_uri: str, folder: Path, *, tracking_uri: str) -> Packed:
    """Copy all files of `model_uri` into `folder`, even damaged files. Raises ValueError."""
    with _registry(model_uri, tracking_uri):
        client, logged, tags = MlflowClient(tracking_uri), model_uri, {}
        if NAMED.fullmatch(model_uri):
            version = named_version(model_uri, tracking_uri=tracking_uri)
            model_uri, logged, tags = f"{REGISTRY}{version.name}/{version.version}", version.source, version.tags
        if FILES_DIGEST not in tags and logged.startswith(REGISTRY):  # a logged model, or one registered by hand
            tags = client.get_logged_model(logged.removeprefix(REGISTRY)).tags
        if FILES_DIGEST not in tags:
            raise ValueError(f"{model_uri} lists no files to compare it with: register it by `cascade run`")
        local = Path(download_artifacts(model_uri, dst_path=str(folder)))
    return Packed(model_uri, local, tags[FILES_DIGEST], tags.get(FILES))


def trained_model(packed: Path) -> Path:
    """The folder of the trained model inside MLflow's folder."""
    return packed / Model.load(packed).flavors["python_function"]["artifacts"][ARTIFACT]["path"]


@contextmanager
def _registry(model_uri: str, tracking_uri: str) -> Iterator[None]:
    mlflow.set_tracking_uri(tracking_uri)  # the registry is found by it, whatever is passed on
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"can't get {model_uri} from the registry at {tracking_uri}: {reason}") from error


def pip_requirements(model: Path) -> list[str]:
    """Requirements of the packed model, pinned to versions installed here, without builds such as +cpu."""
    pretrained = ("transformers",) if any(model.rglob(LENGTH)) else ()  # the text encoder that it is, or that it holds
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *pretrained)]


def save_model(
    path: Path, model: Path, *, mlflow_model: Model | None = None, digests: Mapping[str, str] | None = None
) -> str:
    """Write the folder `model` as an MLflow model at `path`, with code and requirements.

    Args:
        digests: sha256 of files in `model` that are known, by path.

    Returns the list of all files, which lies there too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        package = pack_code(Path(scratch))
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(MODEL_CODE),  # run here with the code that is here, which is the same
            artifacts={ARTIFACT: str(model)},
            code_paths=[str(package)],
            pip_requirements=pip_requirements(model),
            input_example=input_example(model),
            mlflow_model=mlflow_model or Model(),
        )
    (path / MODEL_CODE.name).write_text(model_code(package.name))
    place = trained_model(path).relative_to(path).as_posix()
    return write_list(path, {f"{place}/{name}": digest for name, digest in (digests or {}).items()})


def input_example(model: Path) -> list[dict[str, Any]] | None:
    """An example row for the model; None for a model without rows of its own."""
    example = example_of(model)
    return None if example is None else [example.model_dump(exclude_none=True)]


def _log_model(client: MlflowClient, artifact: Artifact, *, experiment_id: str, run_id: str) -> LoggedModel:
    model = client.create_logged_model(
        experiment_id,
        name=artifact.stage,
        source_run_id=run_id,
        tags=_tags(artifact),
        params=_facts(artifact),
        model_type="image-cascade",
    )
    with tempfile.TemporaryDirectory() as scratch:
        mlflow_model = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            run_id=run_id,
            model_id=model.model_id,
            metadata={name: artifact.provenance[name] for name in CODE if name in artifact.provenance},
        )
        folder = artifact.download(Path(scratch) / "files")
        digests = {name: entry.sha256 for name, entry in zip(artifact.names(), artifact.files, strict=True)}
        text = save_model(Path(scratch) / "packed", folder, mlflow_model=mlflow_model, digests=digests)
        client.log_model_artifacts(model.model_id, str(Path(scratch) / "packed"))
    listed = {FILES: text} if len(text) <= LONGEST_LIST else {}
    client.set_logged_model_tags(model.model_id, listed | {FILES_DIGEST: digest_of_list(text)})
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _is_sound(model: LoggedModel, tracking_uri: str) -> bool:
    """True if a logged model may be registered: all files are unchanged."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            download_model(f"{REGISTRY}{model.model_id}", Path(scratch), tracking_uri=tracking_uri)
        except ValueError:
            return False
    return True


def _create_version(
    client: MlflowClient, name: str, artifact: Artifact, model: LoggedModel, *, run_id: str
) -> ModelVersion:
    if not client.search_registered_models(f"name = '{name}'"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
    tags = _tags(artifact) | {tag: model.tags[tag] for tag in (FILES, FILES_DIGEST) if tag in model.tags}
    source = f"{REGISTRY}{model.model_id}"
    version = client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model.model_id)
    first = find_version(client, name, key=artifact.key)
    if first is not None and int(first.version) < int(version.version):  # another driver was faster
        client.delete_model_version(name, version.version)
        return first
    return version


def _tags(artifact: Artifact) -> dict[str, str]:
    return {
        STAGE: artifact.stage,
        KEY: artifact.key,
        "cascade.artifact": artifact.root,
        "cascade.manifest_sha256": artifact.digest,
        GIT_COMMIT: str(artifact.provenance.get("git_commit", "unknown")),
    }


def _facts(artifact: Artifact) -> dict[str, str]:
    """Plain values of the artifact's metadata: resolution, parameters, last losses."""
    return {name: str(value) for name, value in artifact.metadata.items() if isinstance(value, str | int | float)}
