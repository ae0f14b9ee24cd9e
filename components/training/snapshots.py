"""Snapshots of a power EMA during a training, and the choice of an average afterwards.

A run with `ema: power` leaves two files at each checkpoint, named by profile: `snapshots/0.050-000000200.safetensors`
is the average of width 0.05 after 200 updates. They stay in the run folder when checkpoints are removed, and go into
the model's artifact, so that `choose_average` needs nothing else.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.runtime.storage.artifact import describe, read_records, recorded_parts, write_record
from components.runtime.storage.store import DamagedFileError, Store, in_parallel
from components.sampling.model import BPE
from components.training.power_ema import EMAProfile, nearest_first, posthoc_ema

SNAPSHOTS = "snapshots"


def write_snapshots(folder: Path, state: dict[str, Any], *, sigma_rel: float) -> None:
    """Write the averages of a task's state; equal files of the same moment are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for average, width in zip(("ema.", "second_ema."), nearest_first(sigma_rel), strict=True):
        weights = {
            name.removeprefix(average): tensor.detach().cpu().contiguous().clone()
            for name, tensor in state["weights"].items()
            if name.startswith(average)
        }
        save_file(weights, folder / f"{width:.3f}-{state['learner']['ema_updates']:09d}.safetensors")


def send_snapshots(folder: Path, run: Store) -> None:
    """Copy the files in `folder` to the run folder, each with a record of size and sha256."""
    store = run.join(SNAPSHOTS)
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)
        write_record(store, path.stem, describe(path, path.name))


def fetch_snapshots(run: Store, folder: Path) -> None:
    """Copy the snapshots of a run to `folder`; a run may have none.

    Raises DamagedFileError for a snapshot that is gone or differs from its record.
    """
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

    Raises ValueError for a model without snapshots, or a width without a profile.
    """
    if not (model / SNAPSHOTS).is_dir():
        raise ValueError(f"no {SNAPSHOTS}: only a model that was trained with ema: power lets you choose")
    bundle = load_bundle(model)
    bundle.module.load_state_dict(reconstruct(model / SNAPSHOTS, sigma_rel))
    save_bundle(folder, bundle)
    if (model / BPE).is_file():
        shutil.copyfile(model / BPE, folder / BPE)
    return bundle
