"""Results of a training: a finished model's files in the stage's folder, and snapshots of a power EMA.

A run with `ema: power` leaves two files at each checkpoint, named by profile: `snapshots/0.050-000000200.safetensors`
is the average of width 0.05 after 200 updates. They go into the model's artifact, for `choose_average`. Where networks
are in shards each rank writes its rows (`rows.py`), which are joined on the first rank's disk."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.configuration.optimization import AdapterConfig
from components.models.bundle import DESCRIPTION, NETWORKS, WEIGHTS, write_description
from components.runtime.storage.artifact import FileEntry, parse_stored, upload_attempt
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import DamagedFileError, Store
from components.sampling.model import BPE
from components.training.adapters import add_adapter, merge_adapter
from components.training.checkpoint import IN_WEIGHTS, HostCopy, on_host
from components.training.learner import below, without_memory
from components.training.optim import EMAProfile, combine, nearest_first, posthoc_factors
from components.training.parallel import ALONE, Worker, any_rank, is_cut
from components.training.rows import fetch_rows, rows_file, send_rows, shapes_in, write_tensors
from components.weights.starts import StartModel

METRICS = "metrics.json"
FINISHED = "finished.json"  # of a finished training: the list of its model's files
SNAPSHOTS = "snapshots"
ROWS = "rows"  # folder of a finished model in shards, until it is joined


class ModelDescription(NamedTuple):
    """The description of a model, stored next to its weights."""

    kind: str  # a key of NETWORKS
    network: dict[str, Any]  # arguments of the network's constructor
    settings: dict[str, Any]  # for sampling
    learner: str = ""  # prefix of the network's learner, for a task with several
    texts: dict[str, str] | None = None  # file name -> content, such as the text tokenizer
    adapter: AdapterConfig | None = None  # to be merged
    new_modules: tuple[str, ...] = ()  # that have no adapter


class Trained(NamedTuple):
    """A finished training, or a model that is taken as it is."""

    entries: tuple[FileEntry, ...]  # the model's files, in the stage's folder
    summary: dict[str, float]  # steps, seconds, samples/s, parameters, metrics on held-out data


def write_model(
    folder: Path, description: ModelDescription, *, summary: Mapping[str, float], previews: Mapping[str, bytes]
) -> dict[str, float]:
    """Write description, metrics and the last preview (PNG) next to the averaged weights in `folder`.
    Where there are snapshots of a power EMA the average is chosen from them (`choose_average`). Returns the summary
    with the number of parameters. Raises RuntimeError for weights of another network."""
    if (folder / SNAPSHOTS).is_dir():
        join_snapshots(folder / SNAPSHOTS, summary["ema_sigma_rel"], folder / WEIGHTS)
    with without_memory():
        module = NETWORKS[description.kind](**description.network)
        module.load_state_dict({name: torch.empty(shape) for name, (_, shape) in shapes_in(folder / WEIGHTS).items()})
    write_description(folder, kind=description.kind, network=description.network, settings=description.settings)
    written = {**summary, "parameters": sum(parameter.numel() for parameter in module.parameters())}
    (folder / METRICS).write_text(json.dumps(written, indent=1))
    for name, text in (description.texts or {}).items():
        (folder / name).write_text(text)
    for png in previews.values():
        (folder / "preview.png").write_bytes(png)
    return written


def copy_start(start: StartModel, description: ModelDescription, store: Store) -> Trained:
    """Copies a model, verified, to a stage's store. Runs in a worker.
    Its settings are joined by those of the description. Raises DamagedFileError."""
    with scratch_folder("start") as folder:
        model = start.model
        start.store.download(start.weights, folder, WEIGHTS, expected=start.digest)
        own = {"kind": model.kind, "network": model.network, "settings": model.settings | description.settings}
        summary = write_model(folder, description._replace(**own), summary={}, previews={})
        return Trained(tuple(upload_attempt(store, folder)), summary)


def write_averaged(
    folder: Path, description: ModelDescription, weights: Mapping[str, Tensor], worker: Worker = ALONE
) -> None:
    """Write the rank's rows of a finished model: of the average, or of the network without one.
    `weights`: of the task's state, flat names."""
    own = below(description.learner, dict(weights))
    part, parts = (worker.rank, worker.parts) if worker.shards else (0, 1)
    if part < parts:  # else another copy has the same rows
        averaged = below("ema.", own) or below("network.", own)
        rows = on_host({name: tensor for name, tensor in averaged.items() if part == 0 or is_cut(tensor)})
        file = folder / rows_file(Path(WEIGHTS).stem, part, parts)
        save_file({name: tensor.contiguous() for name, tensor in rows.items()}, file)


def finish(
    run: Store,
    stage_store: Store,
    description: ModelDescription,
    *,
    weights: Mapping[str, Tensor],
    worker: Worker = ALONE,
    **model: Any,
) -> None:
    """Upload a model's files, and list them in the run folder; for `model` see `write_model`.
    Called by all ranks where networks are in shards; the first one joins what each has sent."""
    with scratch_folder("model") as folder:
        rows = run.join(ROWS)
        write_averaged(folder, description, weights, worker)
        if worker.shards:
            send_rows(folder, rows, parts=worker.parts)
            any_rank(False, worker)  # all have sent theirs
        if worker.rank > 0:
            return
        if worker.shards:
            fetch_rows(rows, folder)
        fetch_snapshots(run, folder / SNAPSHOTS)
        if (adapter := description.adapter) is not None:
            module = NETWORKS[description.kind](**description.network)
            add_adapter(module, adapter, new=description.new_modules)
            module.load_state_dict(load_file(folder / WEIGHTS))
            merge_adapter(module, adapter, folder)
            save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / WEIGHTS)
        summary = write_model(folder, description, **model)
        entries = upload_attempt(stage_store, folder)
    listed = {"entries": [entry.model_dump() for entry in entries], "summary": summary}
    run.write(FINISHED, json.dumps(listed).encode())
    if worker.shards:
        rows.delete_folder()


def read_finished(run: Store) -> Trained | None:
    """The results in a run folder; None for an unfinished one. Raises ArtifactError for a damaged list."""
    try:
        return parse_stored(Trained, run.read(FINISHED), run.url(FINISHED))
    except FileNotFoundError:
        return None


def write_snapshots(folder: Path, copy: HostCopy, *, sigma_rel: float) -> None:
    """Write the rank's rows of the averages of a moment; equal files of the same moment are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    updates = copy.state["task"]["learner"]["ema_updates"]
    for average, width in zip(("ema.", "second_ema."), nearest_first(sigma_rel), strict=True):
        rows = {name: tensor.contiguous() for name, tensor in below(IN_WEIGHTS + average, copy.tensors).items()}
        save_file(rows, folder / rows_file(f"{width:.3f}-{updates:09d}", copy.part, copy.parts))


def fetch_snapshots(run: Store, folder: Path) -> None:
    """Copy the snapshots of a run to `folder`, each in one file; a run may have none.
    Raises DamagedFileError for a snapshot that is gone or differs from its record."""
    try:
        fetch_rows(run.join(SNAPSHOTS), folder)
    except (FileNotFoundError, DamagedFileError) as error:
        raise DamagedFileError(f"{error}; no past step is taken again, so train anew with --force") from error


def kept_profiles(folder: Path) -> dict[EMAProfile, Path]:
    """The snapshots in `folder` by profile, the earliest first."""
    files = [(path.stem.split("-"), path) for path in folder.glob("*.safetensors")]
    return dict(sorted((EMAProfile(int(updates), float(width)), path) for (width, updates), path in files))


def join_snapshots(folder: Path, sigma_rel: float, path: Path) -> None:
    """Write the average of width `sigma_rel` at the last snapshot in `folder`, as safetensors.
    Raises ValueError for a width without a profile, or where there is no snapshot."""
    kept = kept_profiles(folder)
    factors = posthoc_factors([*kept], sigma_rel)
    files = [safe_open(file, "pt") for file in kept.values()]

    def combined(name: str) -> Iterator[Tensor]:
        yield combine(({name: file.get_tensor(name)} for file in files), factors)[name]

    write_tensors(path, shapes_in([*kept.values()][-1]), combined)


def choose_average(model: Path, folder: Path, *, sigma_rel: float) -> None:
    """Write the model of another average, with its text tokenizer, to `folder`, without training.
    `model` has an artifact's files. Raises ValueError for one without snapshots, or a width without a profile."""
    if not (model / SNAPSHOTS).is_dir():
        raise ValueError(f"no {SNAPSHOTS}: only a model that was trained with ema: power lets you choose")
    join_snapshots(model / SNAPSHOTS, sigma_rel, folder / WEIGHTS)
    for name in (DESCRIPTION, BPE):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
