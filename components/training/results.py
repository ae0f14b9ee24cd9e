"""Results of a finished training: a model's files in the stage's folder, listed in the run folder."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.runtime.storage.artifact import FileEntry, parse_stored, upload_attempt
from components.runtime.storage.store import SCRATCH, Store
from components.training.learner import below
from components.training.snapshots import SNAPSHOTS, fetch_snapshots, reconstruct

METRICS = "metrics.json"
FINISHED = "finished.json"  # in the run folder of a finished training: the list of its model's files


class ModelDescription(NamedTuple):
    """The description of a model, stored next to its weights."""

    kind: str  # a key of NETWORKS
    network: dict[str, Any]  # arguments of the network's constructor
    settings: dict[str, Any]  # for sampling
    learner: str = ""  # prefix of the network's learner, for a task with several
    texts: dict[str, str] | None = None  # file name -> content of further files, such as the text tokenizer


class Trained(NamedTuple):
    """A finished training."""

    entries: tuple[FileEntry, ...]  # the model's files, in the stage's folder
    summary: dict[str, float]  # steps, seconds, samples/s, parameters and the task's metrics on held-out data


def write_model(
    folder: Path,
    description: ModelDescription,
    *,
    weights: Mapping[str, Tensor],
    summary: Mapping[str, float],
    previews: Mapping[str, bytes],
) -> dict[str, float]:
    """Write a model's files to `folder`: averaged weights, description, metrics, preview.

    Args:
        folder: holds the snapshots of a power EMA already, where there are any; the average is then chosen from them
            (`components.training.snapshots.choose_average`).
        weights: of the task's state, flat names.
        previews: name -> PNG; the last one is written.

    Returns the summary with the number of parameters.
    """
    module = NETWORKS[description.kind](**description.network)
    if (folder / SNAPSHOTS).is_dir():
        module.load_state_dict(reconstruct(folder / SNAPSHOTS, summary["ema_sigma_rel"]))
    else:
        own = below(description.learner, dict(weights))
        module.load_state_dict(below("ema.", own) or below("network.", own))
    save_bundle(folder, ModelBundle(description.kind, description.network, description.settings, module))
    written = {**summary, "parameters": sum(parameter.numel() for parameter in module.parameters())}
    (folder / METRICS).write_text(json.dumps(written, indent=1))
    for name, text in (description.texts or {}).items():
        (folder / name).write_text(text)
    for png in previews.values():
        (folder / "preview.png").write_bytes(png)
    return written


def finish(run: Store, stage_store: Store, description: ModelDescription, **model: Any) -> None:
    """Upload a model's files to the stage's folder, and list them in the run folder.

    For `model` see `write_model`.
    """
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}model-") as place:
        folder = Path(place)
        fetch_snapshots(run, folder / SNAPSHOTS)
        summary = write_model(folder, description, **model)
        entries = upload_attempt(stage_store, folder)
    listed = {"entries": [entry.model_dump() for entry in entries], "summary": summary}
    run.write(FINISHED, json.dumps(listed).encode())


def read_finished(run: Store) -> Trained | None:
    """The results of the training in a run folder; None if it has not finished.

    Raises ArtifactError for a damaged list.
    """
    try:
        return parse_stored(Trained, run.read(FINISHED), run.url(FINISHED))
    except FileNotFoundError:
        return None
