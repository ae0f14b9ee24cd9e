"""Profiles: storage, tracking, workers, GPUs and threads of a run; and the underlying cluster.

Never part of a stage's identity.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from pydantic import Field, ValidationError

from components.configuration.config import Config
from components.configuration.usage import UsageError, explain, nearest
from components.runtime.execution import Resources, Sharding
from components.runtime.storage.store import absolute

CPUS_PER_CORE = 4  # logical CPUs of a Ray that is started here
CPUS_PER_GPU = 8  # of a cluster of which GPUs alone are told: those of a pod in infra/kuberay


class Profile(Config):
    """Execution choices. `stages` overrides `resources` for single stages.
    What is None follows from the cluster: workers from its GPUs and their batch (`pipelines.planning.shares`), threads
    from the node that works (`execution.threads_of`)."""

    name: str = "auto"
    num_workers: int | None = Field(None, ge=1)
    min_workers: int | None = Field(None, ge=1)  # elastic: the number changes in a training
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    threads: int | None = Field(None, ge=1)
    reader_threads: int = Field(2, ge=1)
    max_failures: int = 3
    max_batch_per_device: int | None = None
    sharding: Sharding = "none"  # "full": the workers of a training hold a part each of its weights
    worker_start_timeout: int | None = Field(None, gt=0)  # seconds; see `start_timeout`
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def start_timeout(self) -> int:
        """Seconds for workers to find room: long, because a cold GPU node pulls the image first.
        Elastic trainings don't wait for room, they take what there is; but Ray hears seconds late that a node is lost,
        and then waits for this long before it looks again."""
        return self.worker_start_timeout or (600 if self.min_workers is None else 30)

    def resources(self, stage: str, **found: Any) -> Resources:
        """Resources of a stage: this profile's own values, over the values of `pipelines.planning.shares`.
        Raises ValidationError for a field that there is not, or a value that does not fit."""
        own = ("min_workers", "threads", "reader_threads", "max_failures", "max_batch_per_device", "sharding")
        said = {name: getattr(self, name) for name in own} | self.stages.get(stage, {})
        return Resources.model_validate({"num_workers": 1} | found | said)

    def given(self, stage: str, name: str) -> Any:
        """The profile's own value of a field, for this stage or all stages; None: the cluster decides."""
        return getattr(self.resources(stage) if name in self.stages.get(stage, {}) else self, name)


def load_profile(name_or_file: str) -> Profile:
    """Load a built-in profile or a YAML file. Raises UsageError with the nearest name or the bad field."""
    profiles = {
        "auto": Profile(),
        "laptop": Profile(name="laptop", num_workers=1, gpus_per_worker=0),
        "kuberay": Profile(name="kuberay", gpus_per_worker=1, cpus_per_worker=4, reader_threads=4),
    }
    if name_or_file in profiles:
        return profiles[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no profile {name_or_file!r}{nearest(name_or_file, profiles)}, or a YAML file")
    try:
        profile = Profile.model_validate({"name": path.stem, **(yaml.safe_load(path.read_text()) or {})})
        for stage in profile.stages:
            profile.resources(stage)
    except (ValidationError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"profile {path}: {explain(error, Profile)}") from error
    return profile


def storage_uri(flag: str | None) -> str:
    """The root of all artifacts: the flag, `CASCADE_STORAGE`, or ./runs."""
    return absolute(flag or os.environ.get("CASCADE_STORAGE") or "runs")


def tracking_uri(flag: str | None) -> str | None:
    """MLflow's address: the flag, `MLFLOW_TRACKING_URI`, or a SQLite file in ./runs; None for `none`."""
    uri = flag or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{absolute('runs')}/mlflow.db"
    return None if uri == "none" else uri


class Cluster(NamedTuple):
    """CPUs and GPUs of all nodes together."""

    cpus: float  # logical CPUs
    gpus: float = 0
    cpus_per_gpu: float | None = None  # fewest of a node with GPUs; None: not known
    nodes: int = 1  # that have CPUs
    cpus_per_core: int = 1  # logical CPUs that stand for one core
    here: bool = False  # Ray is started on this machine and has nothing else


def found_cluster(*, here: bool) -> Cluster:
    """The current nodes of the joined or started Ray."""
    import ray  # here, for commands that only read storage work without it

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    own, resources = nodes[ray.get_runtime_context().get_node_id()], nodes.values()
    ratios = [node.get("CPU", 0) / node["GPU"] for node in resources if node.get("GPU", 0) > 0]
    return Cluster(
        cpus=sum(node.get("CPU", 0) for node in resources),
        gpus=sum(node.get("GPU", 0) for node in resources),
        cpus_per_gpu=min(ratios, default=None),
        nodes=max(1, sum(node.get("CPU", 0) > 0 for node in resources)),
        cpus_per_core=max(1, int(own.get("CPU", 0) // (os.cpu_count() or 1))),
        here=here,
    )


def this_machine() -> Cluster:
    """The cluster of a Ray on this machine, without asking Ray."""
    return Cluster(local_cpus(), gpus=usable_gpus(), cpus_per_core=CPUS_PER_CORE, here=True)


def usable_gpus() -> int:
    """Number of this machine's GPUs that torch can use.
    Ray's own count has Apple's too, and GPUs that a torch without CUDA leaves idle: trainings would ask CUDA and
    fail."""
    import torch  # here, for `--help` and `cascade data` work without it

    return torch.cuda.device_count()


def local_cpus() -> int:
    """Logical CPUs of a Ray on this machine: enough tokens for several branches and their readers."""
    return CPUS_PER_CORE * max(2, psutil.cpu_count() or 1)


def parse_cluster(text: str) -> Cluster:
    """Parses a cluster elsewhere, `gpus=64,cpus=512`. Raises UsageError in one line.
    Without cpus there are 8 for each GPU, without gpus there are none."""
    amounts: dict[str, int] = {}
    for item in text.split(","):
        name, _, amount = (part.strip() for part in item.partition("="))
        if name not in ("gpus", "cpus"):
            raise UsageError(
                f"--cluster {text!r}: unknown {name!r}{nearest(name, ('gpus', 'cpus'))}; as gpus=64,cpus=512"
            )
        if name in amounts or not re.fullmatch(r"[0-9]{1,9}", amount):
            raise UsageError(f"--cluster {text!r}: {name} needs one whole number, not {amount!r}; as gpus=64,cpus=512")
        amounts[name] = int(amount)
    gpus = amounts.get("gpus", 0)
    cpus = amounts.get("cpus", CPUS_PER_GPU * gpus)
    if cpus == 0:
        raise UsageError(f"--cluster {text!r}: a cluster needs CPUs; as gpus=64,cpus=512")
    return Cluster(cpus, gpus)
