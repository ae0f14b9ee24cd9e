"""Where and how a workflow runs: storage, tracking, workers, GPUs, threads. Never part of a stage's identity."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from components.configuration.config import Config
from components.configuration.usage import UsageError, explain, nearest
from components.runtime.execution import Resources, Sharding
from components.runtime.storage.store import absolute


class Profile(Config):
    """Execution choices. `stages` overrides `resources` for the stages it names.

    What is None follows from the cluster: workers from its GPUs and their batch (`pipelines.planning.shares`),
    threads from the node that works (`execution.threads_of`), readers from the workers, two for each.
    """

    name: str = "auto"
    num_workers: int | None = Field(None, ge=1)
    min_workers: int | None = Field(None, ge=1)  # elastic: workers are lost and won while a training goes on
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    threads: int | None = Field(None, ge=1)
    readers: int | None = Field(None, ge=1)
    reader_cpus: float = Field(0.5, gt=0)
    max_failures: int = 3
    max_batch_per_device: int | None = None
    sharding: Sharding = "none"  # "full": the workers of a training hold a part each of its weights
    worker_start_timeout: int | None = Field(None, gt=0)  # seconds; see `start_timeout`
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def start_timeout(self) -> int:
        """Seconds that workers may take to find room: long, for a cold GPU node pulls its image first.

        Elastic trainings don't wait for room, they take what there is; but Ray hears seconds late that a node is lost,
        and then waits for this long before it looks again.
        """
        return self.worker_start_timeout or (600 if self.min_workers is None else 30)

    def resources(self, stage: str, **found: Any) -> Resources:
        """What was found for a stage (`pipelines.planning.shares`), and what this profile says of it in its place.

        Raises ValidationError for a field that there is not, or a value that does not fit.
        """
        said = {
            "min_workers": self.min_workers,
            "threads": self.threads,
            "reader_cpus": self.reader_cpus,
            "max_failures": self.max_failures,
            "max_batch_per_device": self.max_batch_per_device,
            "sharding": self.sharding,
        }
        share: dict[str, Any] = {"num_workers": 1} | found | said | self.stages.get(stage, {})
        return Resources.model_validate({"readers": self.readers or 2 * share["num_workers"]} | share)

    def given(self, stage: str, name: str) -> Any:
        """What the profile itself says of a field, for this stage or for all; None: it is to be found."""
        return getattr(self.resources(stage) if name in self.stages.get(stage, {}) else self, name)


def load_profile(name_or_file: str) -> Profile:
    """A built-in profile by name, or a YAML file. Raises UsageError with the nearest name or the bad field."""
    known = {
        "auto": Profile(),
        "laptop": Profile(name="laptop", num_workers=1, gpus_per_worker=0),
        "kuberay": Profile(name="kuberay", gpus_per_worker=1, cpus_per_worker=4, reader_cpus=1),
    }
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no profile {name_or_file!r}{nearest(name_or_file, known)}, or a YAML file")
    try:
        profile = Profile.model_validate({"name": path.stem, **(yaml.safe_load(path.read_text()) or {})})
        for stage in profile.stages:
            profile.resources(stage)
    except (ValidationError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"profile {path}: {explain(error, Profile)}") from error
    return profile


def storage_uri(flag: str | None) -> str:
    """Root of all artifacts: the flag, `CASCADE_STORAGE`, or ./runs."""
    return absolute(flag or os.environ.get("CASCADE_STORAGE") or "runs")


def tracking_uri(flag: str | None) -> str | None:
    """MLflow's address: the flag, `MLFLOW_TRACKING_URI`, or a SQLite file in ./runs. `none` turns tracking off."""
    given = flag or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{absolute('runs')}/mlflow.db"
    return None if given == "none" else given
