"""Models in a real registry, to be served."""

import shutil
from pathlib import Path

import mlflow
import torch
from mlflow import MlflowClient

from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.runtime import events
from components.runtime.tracking.promotion import make_champion
from components.runtime.tracking.registry import register_version
from components.runtime.tracking.tracker import Tracker
from tests.tiny_cascade import commit_model, write_cascade

NAME = "image-cascade-tiny"
CHAMPION = f"models:/{NAME}@champion"


class Registry:
    """MLflow's, in a SQLite file."""

    def __init__(self, home: Path, empty_database: Path) -> None:
        self.home, self.uri = home, f"sqlite:///{shutil.copy(empty_database, home)}"
        mlflow.set_tracking_uri(self.uri)  # what the client itself goes by now and then
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("tiny", artifact_location=(home / "files").as_uri())

    def register(self, folder: Path, *, key: str, **inputs: str) -> str:
        """A new version of a model's folder, and the champion. Returns its number."""
        run = self.client.create_run(self.experiment).info.run_id
        artifact = commit_model(self.home, "cascade", key, folder, **inputs)
        made = register_version(self.client, NAME, artifact, experiment_id=self.experiment, run_id=run)
        self.promote(str(made.version))
        return str(made.version)

    def promote(self, version: str) -> None:
        make_champion(self.client, NAME, version, reason="by hand")


def track_cascade(tracking: str, home: Path, folder: Path, key: str, *, recipe: str = "tiny") -> None:
    """Register a model's folder as the tracker of a run of `recipe` does: a version of `image-cascade-RECIPE`."""
    tracker = Tracker(tracking, experiment=recipe, spool=home / f"spool-{key}", flush_seconds=0.3)
    tracker.emit(events.RunStarted("run", "", {}, {"name": recipe}))
    tracker.emit(events.StageCached("cascade", commit_model(home, "cascade", key, folder)))
    assert tracker.close("FINISHED") == []


def write_other_cascade(folder: Path) -> Path:
    """The tiny cascade with other weights of its base."""
    base = write_cascade(folder) / "base"
    bundle = load_bundle(base)
    torch.manual_seed(1)
    for parameter in bundle.module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_bundle(base, ModelBundle(*bundle))
    return folder / "cascade"
