"""From a run's final state to the folder that a stage commits: a bundle, its summary and its pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from components.storage.bundle import NETWORKS, ModelBundle, save_bundle
from components.training.checkpoint import WEIGHTS
from components.training.learner import below
from components.training.snapshots import SNAPSHOTS, reconstruct

SUMMARY = "summary.json"
METRICS = "metrics.json"


def write_model(
    state: Path, folder: Path, *, kind: str, network: dict[str, Any], settings: dict[str, Any], learner: str = ""
) -> dict[str, float]:
    """Write the averaged weights of a final state, with what rebuilds and describes them, to `folder`.

    A power EMA leaves its snapshots there too; see `components.training.snapshots.choose_average`.

    Args:
        state: what `launch.train` returned.
        kind, network, settings: of the bundle.
        learner: prefix of the learner whose network it is, for a task that has several.

    Returns the summary: steps, seconds, pictures a second, parameters and the task's metrics on held-out data.
    """
    weights, summary = below(learner, load_file(state / WEIGHTS)), json.loads((state / SUMMARY).read_text())
    module = NETWORKS[kind](**network)
    if (state / SNAPSHOTS).is_dir():
        shutil.copytree(state / SNAPSHOTS, folder / SNAPSHOTS)
        module.load_state_dict(reconstruct(state / SNAPSHOTS, summary["ema_sigma_rel"]))
    else:
        module.load_state_dict(below("ema.", weights) or below("network.", weights))
    save_bundle(folder, ModelBundle(kind, network, settings, module))
    summary["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    (folder / METRICS).write_text(json.dumps(summary, indent=1))
    for picture in state.glob("*.png"):
        shutil.copy(picture, folder / "preview.png")
    return summary
