"""Trained models and composed cascades, opened wherever they lie, and registered with their code.

A version in MLflow's registry is known by its stage key (tag `cascade.stage_key`) and registered once. `candidate`
names the version made or used last, `champion` the best (`components.runtime.tracking.promotion`).
"""

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from sqlalchemy.exc import SQLAlchemyError

from components.models.bundle import DESCRIPTION as MODEL
from components.models.file_list import LIST, check_files, digest_of_list, write_list
from components.runtime.storage.artifact import Artifact, commit_artifact, describe, load_artifact
from components.runtime.storage.connection import shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, absolute
from components.runtime.tracking import names
from components.runtime.tracking.packed_code import MODEL_CODE, model_code, pack_code
from components.sampling.answers import REGISTERED, example_of
from components.sampling.cascade import DESCRIPTION
from components.sampling.frozen_text import LENGTH

REQUIREMENTS = ("einops", "mlflow", "numpy", "pillow", "pydantic", "safetensors", "tokenizers", "torch")
CODE = ("git_commit", "code")  # of an artifact's provenance: which code made it, module by module
LONGEST_LIST = 60_000  # characters; a tag takes no more on MySQL, and a longer list lies in the model alone
NAMED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))")  # by an alias, or by a version's number
ARTIFACT = "model"  # what the cascade_model calls the folder of the trained model


class Named(NamedTuple):
    """The current version of an address."""

    name: str
    version: str
    created: int  # seconds since 1970

    @property
    def uri(self) -> str:
        return f"{names.REGISTRY}{self.name}/{self.version}"


class Packed(NamedTuple):
    """A local copy of a registered model, with the registered digests."""

    uri: str  # by its version's number
    folder: Path
    digest: str  # of the list of its files
    files: str | None  # the list; None: too long to stand in the registry


@contextmanager
def local_model(source: str, *, tracking_uri: str | None) -> Iterator[Path]:
    """The verified folder of a trained model or a cascade; a downloaded copy is removed afterwards.
    Raises ValueError, in one line, if there is none or it differs; StoreError and ArtifactError as storage does."""
    if source.startswith(names.REGISTRY):
        with scratch_folder("model") as folder:
            yield download_model(source, folder, tracking_uri=tracking_uri)
    elif is_model_folder(source):
        if (packed := packed_around(Path(source))) is not None:
            check_files(packed, source)
        yield Path(source)
    else:
        with model_artifact(source).local_copy() as folder:
            yield folder


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


def find_named(model_uri: str, *, tracking_uri: str | None) -> Named:
    """Name, number and time of the version from `named_version`."""
    version = named_version(model_uri, tracking_uri=tracking_uri)
    return Named(version.name, str(version.version), version.creation_timestamp // 1000)


def named_version(model_uri: str, *, tracking_uri: str | None) -> ModelVersion:
    """The current version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
    Raises ValueError, in one line, if the registry has none or can't be reached."""
    with _registry(model_uri, tracking_uri) as client:
        if (parts := NAMED.fullmatch(model_uri)) is None:
            raise ValueError(f"{model_uri} names no version: write models:/NAME@ALIAS or models:/NAME/VERSION")
        name, alias, number = parts.groups()
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)


def stored_model(model_uri: str, *, tracking_uri: str | None) -> tuple[str, Artifact]:
    """The address by number of a named version, and the artifact in storage that it was registered from.
    Raises ValueError, in one line, as `named_version`, and for a version whose artifact is no longer there."""
    version = named_version(model_uri, tracking_uri=tracking_uri)
    place, uri = version.tags.get(names.PLACE), f"{names.REGISTRY}{version.name}/{version.version}"
    artifact = load_artifact(Store(place)) if place else None
    if artifact is None or artifact.digest != version.tags.get(names.MANIFEST):
        gone = f"{shown(place) if place else 'a folder that nobody wrote down'}, where it is no longer"
        raise ValueError(f"{uri} was registered from {gone}: give the folder of a trained model")
    return uri, artifact


def description_of(model_uri: str, *, tracking_uri: str | None) -> str:
    """The Markdown that a run wrote of a registered model. Raises ValueError as `named_version`."""
    with _registry(model_uri, tracking_uri) as client:
        version = named_version(model_uri, tracking_uri=tracking_uri)
        about = client.get_registered_model(version.name).description
    return "\n\n".join(filter(None, (about, version.description)))


def download_model(model_uri: str, folder: Path, *, tracking_uri: str | None) -> Path:
    """Copy the trained model inside `models:/NAME@ALIAS` into `folder`. Returns the model's folder.
    Raises ValueError as `named_version`, and for a copy that is not as it was registered."""
    packed = download_packed(model_uri, folder, tracking_uri=tracking_uri)
    check_files(packed.folder, packed.uri, digest=packed.digest, text=packed.files)
    return trained_model(packed.folder)


def download_packed(model_uri: str, folder: Path, *, tracking_uri: str | None) -> Packed:
    """Copy all files of `model_uri` into `folder`, even damaged files. Raises ValueError."""
    with _registry(model_uri, tracking_uri) as client:
        logged, tags = model_uri, {}
        if NAMED.fullmatch(model_uri):
            version = named_version(model_uri, tracking_uri=tracking_uri)
            model_uri, logged, tags = f"{names.REGISTRY}{version.name}/{version.version}", version.source, version.tags
        if names.FILES_DIGEST not in tags and logged.startswith(names.REGISTRY):  # logged, or registered by hand
            tags = client.get_logged_model(logged.removeprefix(names.REGISTRY)).tags
        if names.FILES_DIGEST not in tags:
            raise ValueError(f"{model_uri} lists no files to compare it with: register it by `cascade run`")
        local = Path(download_artifacts(model_uri, dst_path=str(folder)))
    return Packed(model_uri, local, tags[names.FILES_DIGEST], tags.get(names.FILES))


def trained_model(packed: Path) -> Path:
    """The folder of the trained model inside MLflow's folder."""
    return packed / Model.load(packed).flavors["python_function"]["artifacts"][ARTIFACT]["path"]


@contextmanager
def _registry(model_uri: str, tracking_uri: str | None) -> Iterator[MlflowClient]:
    """The registry's client. Raises ValueError where none is known, and for what it can't do."""
    if tracking_uri is None:
        raise ValueError(f"{model_uri} is in a registry: name it with --tracking")
    if tracking_uri.startswith(names.SQLITE) and not Path(file := tracking_uri.removeprefix(names.SQLITE)).is_file():
        raise ValueError(f"{model_uri} is in a registry, and {file} is not there: name it with --tracking")  # or made
    mlflow.set_tracking_uri(tracking_uri)  # the registry is found by it, whatever is passed on
    with in_one_line(f"can't get {model_uri} from the registry at {shown(tracking_uri)}"):
        yield MlflowClient(tracking_uri)


@contextmanager
def in_one_line(failure: str) -> Iterator[None]:
    """Raises errors of MLflow, a database or a missing driver as ValueError: `failure` and the reason."""
    try:
        yield
    except (MlflowException, OSError, ImportError, SQLAlchemyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{failure}: {reason}") from error


def register_average(model_uri: str, folder: Path, *, sigma_rel: float, tracking_uri: str) -> ModelVersion:
    """Register the model in `folder`, an average of `model_uri`, as candidate under the same name.
    Its stage key is its source's with the average's length, so that it is registered once. Raises ValueError."""
    client, source = MlflowClient(tracking_uri), named_version(model_uri, tracking_uri=tracking_uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    artifact = Artifact(
        kind="model",
        stage=source.tags[names.STAGE],
        key=f"{source.tags[names.KEY]}-ema-{sigma_rel:g}",
        files=tuple(describe(path, path.relative_to(folder).as_posix()) for path in files),
        metadata={"ema_sigma_rel": sigma_rel},
        provenance={"git_commit": source.tags[names.GIT_COMMIT]},
        root=str(folder.resolve()),
    )
    with in_one_line(f"{folder} is written, but not registered"):
        artifact = commit_artifact(Store(artifact.root), artifact)  # a training may begin with it
        experiment_id = client.get_run(source.run_id).info.experiment_id
        return register_version(client, source.name, artifact, experiment_id=experiment_id, run_id=source.run_id)


def register_version(
    client: MlflowClient, name: str, artifact: Artifact, *, experiment_id: str, run_id: str
) -> ModelVersion:
    """Register a model artifact as candidate, unless registered already.
    `run_id`: the run that shows as its source. Raises ArtifactError if the stored files differ from the manifest."""
    version = _find_version(client, name, artifact)
    if version is None:
        model = find_logged_model(client, experiment_id, artifact)
        if model is None or not _is_sound(model, str(client.tracking_uri)):
            model = _log_model(client, name, artifact, experiment_id=experiment_id, run_id=run_id)
        create_name(client, name)
        own = {tag: model.tags[tag] for tag in (names.FILES, names.FILES_DIGEST) if tag in model.tags}
        tags = _tags(artifact) | own
        source = f"{names.REGISTRY}{model.model_id}"
        version = client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model.model_id)
        first = _find_version(client, name, artifact)
        if first is not None and int(first.version) < int(version.version):  # another driver was faster
            client.delete_model_version(name, version.version)
            version = first
    client.set_registered_model_alias(name, names.CANDIDATE, version.version)
    return version


def _find_version(client: MlflowClient, name: str, artifact: Artifact) -> ModelVersion | None:
    versions = client.search_model_versions(f"name = '{name}' and {_made_as(artifact)}")
    listed = [version for version in versions if names.FILES_DIGEST in version.tags]
    return min(listed, key=lambda version: int(version.version), default=None)


def name_of(models: str, artifact: Artifact) -> str:
    """Registered name of a model artifact of a run with the name `models`."""
    return names.registered_name(models, stage=None if DESCRIPTION in artifact.names() else artifact.stage)


def find_logged_model(client: MlflowClient, experiment_id: str, artifact: Artifact) -> LoggedModel | None:
    """The finished logged model of a model artifact, or None."""
    models = client.search_logged_models([experiment_id], _made_as(artifact))
    ready = [model for model in models if model.status == LoggedModelStatus.READY]
    return min(ready, key=lambda model: model.creation_timestamp, default=None)


def _made_as(artifact: Artifact) -> str:
    """A filter by stage key and manifest: a forced try has the key of the try before."""
    return f"tags.`{names.KEY}` = '{artifact.key}' and tags.`{names.MANIFEST}` = '{artifact.digest}'"


def _is_sound(model: LoggedModel, tracking_uri: str) -> bool:
    """True if a logged model may be registered: all files are unchanged."""
    with scratch_folder("check") as scratch, suppress(ValueError):
        return bool(download_model(f"{names.REGISTRY}{model.model_id}", scratch, tracking_uri=tracking_uri))
    return False


def create_name(client: MlflowClient, name: str, *, tags: Mapping[str, Any] | None = None) -> None:
    """Create a registered name, unless it is there or another driver is faster."""
    try:
        client.create_registered_model(name, tags=dict(tags or {}))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(client: MlflowClient, name: str, artifact: Artifact, *, experiment_id: str, run_id: str) -> LoggedModel:
    facts = artifact.metadata.items()  # resolution, parameters, last losses
    model = client.create_logged_model(
        experiment_id,
        name=artifact.stage,
        source_run_id=run_id,
        tags=_tags(artifact),
        params={name: str(value) for name, value in facts if isinstance(value, str | int | float)},
        model_type="image-cascade",
    )
    with scratch_folder("model") as scratch:
        mlflow_model = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            run_id=run_id,
            model_id=model.model_id,
            metadata={REGISTERED: name} | {own: artifact.provenance[own] for own in CODE if own in artifact.provenance},
        )
        folder = artifact.download(scratch / "files")
        digests = {name: entry.sha256 for name, entry in zip(artifact.names(), artifact.files, strict=True)}
        text = save_model(scratch / "packed", folder, mlflow_model=mlflow_model, digests=digests)
        client.log_model_artifacts(model.model_id, str(scratch / "packed"))
    listed = {names.FILES: text} if len(text) <= LONGEST_LIST else {}
    client.set_logged_model_tags(model.model_id, listed | {names.FILES_DIGEST: digest_of_list(text)})
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _tags(artifact: Artifact) -> dict[str, str]:
    return {
        names.STAGE: artifact.stage,
        names.KEY: artifact.key,
        names.PLACE: artifact.root,
        names.MANIFEST: artifact.digest,
        names.GIT_COMMIT: str(artifact.provenance.get("git_commit", "unknown")),
    }


def save_model(
    path: Path, model: Path, *, mlflow_model: Model | None = None, digests: Mapping[str, str] | None = None
) -> str:
    """Write the folder `model` as an MLflow model at `path`, with code and requirements.
    `digests`: sha256 of files in `model` that are known, by path. Returns the list of all files."""
    with scratch_folder("package") as scratch:
        package = pack_code(scratch)
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


def pip_requirements(model: Path) -> list[str]:
    """Requirements of the packed model, pinned to versions installed here, without builds such as +cpu."""
    pretrained = ("transformers",) if any(model.rglob(LENGTH)) else ()  # for a text encoder in it
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *pretrained)]


def input_example(model: Path) -> list[dict[str, Any]] | None:
    """An example row for the model; None for a model without rows of its own."""
    example = example_of(model)
    return None if example is None else [example.model_dump(exclude_none=True)]
