"""Where and how a workflow runs: storage, tracking, workers, GPUs, threads. Never part of a stage's identity."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from components.configuration import Config
from components.execution import Resources
from components.storage.store import absolute
from pipelines.recipes.overrides import explain
from pipelines.session import TOKENS_A_CORE
from pipelines.workflow import UsageError, nearest


class Profile(Config):
    """Execution choices. `stages` overrides `resources` for the stages it names.

    Without `gpus_per_worker` or `num_workers` they follow from the cluster that is found; without `readers` there are
    two for each worker.
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
    worker_start_timeout: int | None = Field(None, gt=0)  # seconds; see `start_timeout`
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def start_timeout(self) -> int:
        """Seconds that workers may take to find room: long, for a cold GPU node pulls its image first.

        Elastic trainings don't wait for room, they take what there is; but Ray hears seconds late that a node is lost,
        and then waits for this long before it looks again.
        """
        return self.worker_start_timeout or (600 if self.min_workers is None else 30)

    def resources(
        self,
        stage: str,
        *,
        cluster: dict[str, float],
        branches: int,
        beside: int | None = None,
        yields: bool = False,
    ) -> Resources:
        """The share of `cluster` that one stage gets when up to `branches` stages run at once.

        Args:
            beside: trainings that are expected to run while this stage does, itself included; they share the cores of
                the machine. None: `branches`.
            yields: where cores are shared, the others go first.

        All training workers together claim at most half of the logical CPUs, so the tasks that read the shards always
        find some: two trainings can't starve each other (ray-notes, item 11).
        """
        gpus = self.gpus_per_worker if self.gpus_per_worker is not None else float(cluster.get("GPU", 0) > 0)
        workers = self.num_workers or max(1, int(cluster.get("GPU", 0) // max(1, branches)) if gpus else 1)
        fair = cluster.get("CPU", 1) / 2 / (branches * workers)
        threads = self.threads or max(1, (os.cpu_count() or 1) // min(2, beside or branches))
        actors = workers if gpus else max(workers, int(cluster.get("CPU", 1)) // TOKENS_A_CORE // threads)
        shared: dict[str, Any] = {
            "num_workers": workers,
            "min_workers": self.min_workers,
            "num_actors": actors,
            "cpus_per_worker": max(0.01, round(min(self.cpus_per_worker, fair), 2)),
            "gpus_per_worker": gpus,
            "threads": threads,
            "yields": yields,
            "reader_cpus": self.reader_cpus,
            "max_failures": self.max_failures,
            "max_batch_per_device": self.max_batch_per_device,
        }
        share = shared | self.stages.get(stage, {})
        return Resources.model_validate({"readers": self.readers or 2 * share["num_workers"]} | share)


def load_profile(name_or_file: str) -> Profile:
    """A built-in profile by name, or a YAML file. Raises UsageError with the nearest name or the bad field."""
    known = {
        "auto": Profile(),
        "laptop": Profile(name="laptop", num_workers=1, gpus_per_worker=0),
        "kuberay": Profile(name="kuberay", num_workers=4, gpus_per_worker=1, cpus_per_worker=4, reader_cpus=1),
    }
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no profile {name_or_file!r}{nearest(name_or_file, known)}, or a YAML file")
    try:
        profile = Profile.model_validate({"name": path.stem, **(yaml.safe_load(path.read_text()) or {})})
        for stage in profile.stages:
            profile.resources(stage, cluster={"CPU": 1}, branches=1)
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
