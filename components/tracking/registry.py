"""Trained models and composed cascades in MLflow's registry, as models from code that carry their own code.

A version is known by its stage key (tag `cascade.stage_key`) and registered once. `candidate` names the version made or
used last, `champion` the one of the last run that ended well.
"""

import importlib.metadata
import json
import shutil
import tempfile
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
from PIL import Image

import components
from components.diffusion.degradation import MASK_TASKS
from components.sampling.cascade import DESCRIPTION
from components.sampling.frozen_text import LENGTH
from components.sampling.image_files import base64_png
from components.sampling.model import works_alone
from components.storage.artifact import Artifact
from components.storage.bundle import DESCRIPTION as MODEL
from components.tracking.names import registered_name
from components.tracking.runs import KEY, STAGE

CANDIDATE, CHAMPION = "candidate", "champion"
MODEL_CODE = Path(__file__).with_name("cascade_model.py")
PACKED = ("__init__.py", "diffusion", "losses", "models", "sampling", "storage/__init__.py", "storage/bundle.py")
REQUIREMENTS = ("einops", "mlflow", "numpy", "pillow", "safetensors", "tokenizers", "torch")
ARTIFACT = "model"  # what the cascade_model calls the folder of the trained model


class Registered(NamedTuple):
    name: str
    version: str
    model_id: str


def model_name(artifact: Artifact, *, models: str) -> str:
    """The registered name of one of a run's `models`: theirs for the composed cascade, with its stage for another."""
    return registered_name(models, stage=None if DESCRIPTION in artifact.names() else artifact.stage)


def register_artifact(
    client: MlflowClient, artifact: Artifact, *, models: str, experiment_id: str, run_id: str
) -> Registered:
    """Register a model artifact as candidate, unless its stage key is there already.

    Args:
        models: what the models of the run are called.
        run_id: the run that shows as its source.

    Raises ArtifactError if the stored files differ from the manifest.
    """
    name = model_name(artifact, models=models)
    version = find_version(client, name, key=artifact.key)
    if version is None:
        model = find_logged_model(client, experiment_id, key=artifact.key)
        if model is None:
            model = _log_model(client, artifact, experiment_id=experiment_id, run_id=run_id)
        version = _create_version(client, name, artifact, model_id=model.model_id, run_id=run_id)
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    return Registered(name, str(version.version), version.source.removeprefix("models:/"))


def promote(client: MlflowClient, name: str, version: str) -> None:
    """Make a version the champion."""
    client.set_registered_model_alias(name, CHAMPION, version)


def find_version(client: MlflowClient, name: str, *, key: str) -> ModelVersion | None:
    """The version registered for a stage key, or None."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def find_logged_model(client: MlflowClient, experiment_id: str, *, key: str) -> LoggedModel | None:
    """The finished logged model of a stage key, or None."""
    found = client.search_logged_models([experiment_id], f"tags.`{KEY}` = '{key}'")
    ready = [model for model in found if model.status == LoggedModelStatus.READY]
    return min(ready, key=lambda model: model.creation_timestamp) if ready else None


def download_model(model_uri: str, folder: Path, *, tracking_uri: str) -> Path:
    """Copy the trained model inside `models:/NAME@ALIAS` into `folder`. Returns the folder that holds it.

    Raises ValueError, in one line, if the registry has no such model or can't be reached.
    """
    mlflow.set_tracking_uri(tracking_uri)  # the registry is found by it, whatever is passed on
    try:
        local = download_artifacts(model_uri, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"can't get {model_uri} from the registry at {tracking_uri}: {reason}") from error
    return Path(local) / Model.load(local).flavors["python_function"]["artifacts"][ARTIFACT]["path"]


def pip_requirements(model: Path) -> list[str]:
    """What the packed model needs, pinned to what is installed here; a build such as +cpu is the installer's choice."""
    pretrained = ("transformers",) if any(model.rglob(LENGTH)) else ()  # the text encoder that it is, or that it holds
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *pretrained)]


def save_model(path: Path, model: Path, *, mlflow_model: Model | None = None) -> None:
    """Write the folder `model`, with the code and requirements to run it anywhere, as an MLflow model at `path`."""
    with tempfile.TemporaryDirectory() as scratch:
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(MODEL_CODE),
            artifacts={ARTIFACT: str(model)},
            code_paths=[str(pack_code(Path(scratch)))],
            pip_requirements=pip_requirements(model),
            input_example=_input_example(model),
            mlflow_model=mlflow_model or Model(),
        )


def pack_code(folder: Path) -> Path:
    """Copy the rooms that sampling needs into `folder`. Returns the package's own folder."""
    source, package = Path(components.__file__).parent, folder / "components"
    for part in PACKED:
        target = package / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
        else:
            shutil.copyfile(source / part, target)
    return package


def _input_example(model: Path) -> list[dict[str, Any]] | None:
    """One row that the cascade_model of `model` takes; None for one that takes none alone."""
    if (model / DESCRIPTION).is_file():
        return [_row_of_cascade(model)]
    if not (model / MODEL).is_file():  # a pretrained text encoder
        return [{"prompt": "red"}]
    about = _description(model)
    kind, network, settings = about["kind"], about["network"], about["settings"]
    if not works_alone(kind, network, settings):
        return None
    row = {} if kind == "noisy_classifier" else _conditions(network) | _given_image(settings)
    if network.get("condition_grid"):
        height, width = network["condition_grid"]
        row["condition"] = json.dumps([[0] * width] * height)
    tokenizer = kind == "autoencoder" and network.get("bottleneck") != "gaussian"
    if tokenizer or kind == "noisy_classifier" or settings.get("role") == "upsampler":
        row["image"] = _gray_image(settings.get("low_res_resolution", settings["resolution"]))
    return [row]


def _row_of_cascade(model: Path) -> dict[str, Any]:
    stages = json.loads((model / DESCRIPTION).read_text())["stages"]
    first = next(stages[name] for name in ("base", "prior", "model") if name in stages)
    about = _description(model / first)
    row = _conditions(about["network"]) | _given_image(about["settings"])
    if first == "base":
        row |= {"generator": "diffusion", "guidance_scale": 2.0, "steps": 10}
    if "classifier" in stages:
        row |= {"label": "0", "classifier_scale": 1.0}
    if "condition" in stages:
        row["condition"] = _gray_image(_description(model / stages["condition"])["settings"]["resolution"])
    return row


def _description(model: Path) -> dict[str, Any]:
    return json.loads((model / MODEL).read_text())


def _conditions(network: dict[str, Any]) -> dict[str, Any]:
    """A label or a prompt, where the network takes one, and a seed."""
    if network.get("num_classes"):
        return {"label": "0", "seed": 1}
    texts = ("text", "text_length", "text_states_dim", "image_embedding_dim")
    return {"prompt": "red", "seed": 1} if any(network.get(name) for name in texts) else {"seed": 1}


def _given_image(settings: dict[str, Any]) -> dict[str, Any]:
    """What a diffusion model is conditioned on, or works on: an image of its size, of which all is to be made."""
    side = settings.get("resolution", 0)
    if settings.get("condition_member"):
        return {"condition": _gray_image(side)}
    if settings.get("role") != "image_to_image":
        return {}
    task = settings["tasks"][0]
    side = side // settings["factors"][0] if task == "super_resolution" else side
    mask = {"mask": _gray_image(side)} if task in MASK_TASKS else {}
    return {"task": task, "image": _gray_image(side)} | mask


def _gray_image(side: int) -> str:
    return base64_png(Image.new("RGB", (side, side), "gray"))


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
        about = Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        )
        folder = artifact.download(Path(scratch) / "files")
        save_model(Path(scratch) / "packed", folder, mlflow_model=about)
        client.log_model_artifacts(model.model_id, str(Path(scratch) / "packed"))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _create_version(client: MlflowClient, name: str, artifact: Artifact, *, model_id: str, run_id: str) -> ModelVersion:
    if not client.search_registered_models(f"name = '{name}'"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
    made = client.create_model_version(
        name, f"models:/{model_id}", run_id=run_id, tags=_tags(artifact), model_id=model_id
    )
    first = find_version(client, name, key=artifact.key)
    if first is not None and int(first.version) < int(made.version):  # another driver was faster
        client.delete_model_version(name, made.version)
        return first
    return made


def _tags(artifact: Artifact) -> dict[str, str]:
    return {
        STAGE: artifact.stage,
        KEY: artifact.key,
        "cascade.artifact": artifact.root,
        "cascade.git_commit": str(artifact.provenance.get("git_commit", "unknown")),
    }


def _facts(artifact: Artifact) -> dict[str, str]:
    """Plain values of the artifact's metadata: resolution, parameters, last losses."""
    return {name: str(value) for name, value in artifact.metadata.items() if isinstance(value, str | int | float)}
