"""What a run was made from and what it made, in MLflow's own terms: data sets and logged models."""

import json
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from components.runtime.storage.artifact import Artifact

DIGEST_CHARACTERS = 36  # MLflow's limit
COUNTS = ("samples", "train_samples", "holdout_samples", "shards")  # of an artifact's metadata, where it has them


def dataset_of(artifact: Artifact) -> Dataset:
    """An artifact as MLflow's data set: its stage, its key as the digest, and its address whatever the storage is."""
    profile = {"bytes": sum(entry.bytes for entry in artifact.files), "files": len(artifact.files)}
    profile |= {name: artifact.metadata[name] for name in COUNTS if name in artifact.metadata}
    scheme = urlsplit(artifact.root).scheme
    return Dataset(
        name=artifact.stage,
        digest=artifact.key[:DIGEST_CHARACTERS],
        source_type="local" if scheme in ("", "file") else scheme,
        source=json.dumps({"uri": artifact.root}),
        profile=json.dumps(profile),
    )


def record_inputs(client: MlflowClient, run_id: str, *, data: list[Artifact], model_ids: list[str]) -> None:
    """Say what a run reads. Doing it twice records it once."""
    known = client.get_run(run_id).inputs.model_inputs or []
    new = [LoggedModelInput(id_) for id_ in model_ids if id_ not in {model.model_id for model in known}]
    context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    datasets = [DatasetInput(dataset_of(artifact), tags=context) for artifact in data]
    if datasets or new:
        client.log_inputs(run_id, datasets=datasets, models=new)


def record_output(client: MlflowClient, run_id: str, *, model_id: str) -> None:
    """Say which model a run made. Doing it twice records it once."""
    outputs = client.get_run(run_id).outputs
    if model_id not in {model.model_id for model in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
