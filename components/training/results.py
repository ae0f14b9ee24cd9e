"""Results of a training: a finished model's files in the stage's folder, and snapshots of a power EMA.

A run with `ema: power` leaves two files at each checkpoint, named by profile: `snapshots/0.050-000000200.safetensors`
is the average of width 0.05 after 200 updates. They stay in the run folder when checkpoints are removed, and go into
the model's artifact, so that `choose_average` needs nothing else."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from components.models.bundle import NETWORKS, ModelBundle, load_bundle, save_bundle
from components.runtime.storage.artifact import (
    FileEntry,
    describe,
    parse_stored,
    read_records,
    recorded_parts,
    upload_attempt,
    write_record,
)
from components.runtime.storage.store import SCRATCH, DamagedFileError, Store, in_parallel
from components.sampling.model import BPE
from components.training.learner import below
from components.training.optim import EMAProfile, nearest_first, posthoc_ema

METRICS = "metrics.json"
FINISHED = "finished.json"  # in the run folder of a finished training: the list of its model's files
SNAPSHOTS = "snapshots"


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
            (`choose_average`).
        weights: of the task's state, flat names.
        previews: name -> PNG; the last one is written.

    Returns the summary with the number of parameters."""
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
    For `model` see `write_model`."""
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}model-") as place:
        folder = Path(place)
        fetch_snapshots(run, folder / SNAPSHOTS)
        summary = write_model(folder, description, **model)
        entries = upload_attempt(stage_store, folder)
    listed = {"entries": [entry.model_dump() for entry in entries], "summary": summary}
    run.write(FINISHED, json.dumps(listed).encode())


def read_finished(run: Store) -> Trained | None:
    """The results of the training in a run folder; None if it has not finished.
    Raises ArtifactError for a damaged list."""
    try:
        return parse_stored(Trained, run.read(FINISHED), run.url(FINISHED))
    except FileNotFoundError:
        return None


class Snapshots(NamedTuple):
    """Averages of a moment, in the host's memory."""

    weights: dict[str, Tensor]  # of a task's state, flat names
    updates: int  # of the averages


def write_snapshots(folder: Path, snapshots: Snapshots, *, sigma_rel: float) -> None:
    """Write averages; equal files of the same moment are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for average, width in zip(("ema.", "second_ema."), nearest_first(sigma_rel), strict=True):
        own = below(average, snapshots.weights).items()
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own}
        save_file(weights, folder / f"{width:.3f}-{snapshots.updates:09d}.safetensors")


def send_snapshots(folder: Path, run: Store) -> None:
    """Copy the files in `folder` to the run folder, each with a record of size and sha256."""
    store = run.join(SNAPSHOTS)
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)
        write_record(store, path.stem, describe(path, path.name))


def fetch_snapshots(run: Store, folder: Path) -> None:
    """Copy the snapshots of a run to `folder`; a run may have none.
    Raises DamagedFileError for a snapshot that is gone or differs from its record."""
    store = run.join(SNAPSHOTS)
    try:
        files = [file for record in read_records(store, sorted(recorded_parts(store))) for file in record.files]
        in_parallel(lambda file: store.download(file.path, folder, file.path, expected=file.digest), files)
    except (FileNotFoundError, DamagedFileError) as error:
        raise DamagedFileError(f"{error}; no past step is taken again, so train anew with --force") from error


def kept_profiles(folder: Path) -> dict[EMAProfile, Path]:
    """The snapshots in `folder` by profile, the earliest first."""
    files = [(path.stem.split("-"), path) for path in folder.glob("*.safetensors")]
    return dict(sorted((EMAProfile(int(updates), float(width)), path) for (width, updates), path in files))


def reconstruct(folder: Path, sigma_rel: float) -> dict[str, Tensor]:
    """`posthoc_ema` of the files in `folder`, read in turn. Raises ValueError as `posthoc_ema`."""
    files = kept_profiles(folder)
    return posthoc_ema([*files], (load_file(path) for path in files.values()), sigma_rel)


def choose_average(model: Path, folder: Path, *, sigma_rel: float) -> ModelBundle:
    """Write the model of another average, with its text tokenizer, to `folder`, without training.

    Args:
        model: a model artifact's files, from a run with `ema: power`.

    Raises ValueError for a model without snapshots, or a width without a profile."""
    if not (model / SNAPSHOTS).is_dir():
        raise ValueError(f"no {SNAPSHOTS}: only a model that was trained with ema: power lets you choose")
    bundle = load_bundle(model)
    bundle.module.load_state_dict(reconstruct(model / SNAPSHOTS, sigma_rel))
    save_bundle(folder, bundle)
    if (model / BPE).is_file():
        shutil.copyfile(model / BPE, folder / BPE)
    return bundle
