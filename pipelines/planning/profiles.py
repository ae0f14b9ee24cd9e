"""Profiles: storage, tracking, workers, GPUs and threads of a run; and the underlying cluster.

Never part of a stage's identity.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import psutil
import yaml
from pydantic import Field, ValidationError

from components.configuration.config import Config
from components.configuration.usage import UsageError, explain, nearest
from components.runtime.execution import Resources, Sharding
from components.runtime.storage.store import absolute

CPUS_PER_CORE = 4  # logical CPUs of a Ray that is started here
CPUS_PER_GPU = 8  # where GPUs alone are told: of a pod in infra/kuberay
NODE_GPUS = 8  # of a node of such a cluster
# Share of its peak that a GPU reaches in matrix products and convolutions: the published days of ADM's five trainings
# leave for them, beside the memory's part, 0.38 to 0.54 of a V100's 125 TFLOP/s (`cost_table.COMPUTE`).
PRODUCTS = 0.45
MEASURED = Path("bench-gpu.json")  # of `make bench-gpu`, in the working directory

Aim = Literal["knee", "fastest", "cheapest"]  # see `cost.chosen`
Network = Literal["tcp", "efa", "rdma"]  # between nodes, by the overlays of infra/kuberay


class GPU(NamedTuple):
    """Figures of a GPU's data sheet, without sparsity, and of nodes that have eight of them."""

    name: str
    peak: float  # FLOP/s of dense matrix products in bf16
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s each way in its node: NVLink, else PCIe 4.0 x16
    fabric: float  # bytes/s each way by EFA or InfiniBand: the slower of Amazon's and Azure's
    products: float = PRODUCTS  # share of the peak
    measured: float | None = None  # seconds of a step over those of `step_time`; None: uncalibrated


# NVIDIA's data sheets and product pages, with half the peak where they state it with sparsity; networks of p4de, p5,
# p5en, g6 and g6e on Amazon's pages of instances: 400, 3,200, 3,200, 100 and 400 Gbit/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 312e12, 80e9, 2.039e12, 300e9, 50e9),  # SXM, 80 GB
        GPU("h100", 989e12, 80e9, 3.35e12, 450e9, 400e9),  # SXM; 1,979 with sparsity
        GPU("h200", 989e12, 141e9, 4.8e12, 450e9, 400e9),  # SXM; 1,979 with sparsity
        GPU("l4", 121e12, 24e9, 300e9, 32e9, 12.5e9),  # 242 with sparsity
        GPU("l40s", 362e12, 48e9, 864e9, 32e9, 50e9),  # 733 with sparsity
    )
}


def gpu_named(name: str, *, option: str = "--gpu", products: float | None = None) -> GPU:
    """A GPU by name, with what was measured on such a card, if any.
    Raises UsageError for an unknown GPU, and a share that can't be."""
    if name not in GPUS:
        raise UsageError(f"{option}: unknown {name!r}{nearest(name, GPUS)}")
    products = PRODUCTS if products is None else products
    if not 0 < products <= 1:
        raise UsageError(f"--mfu must be above 0 and at most 1, not {products:g}")
    try:
        rows = json.loads(MEASURED.read_text()) if MEASURED.exists() else []
        own = [row for row in rows if "modeled" in row and gpu_of(row["machine"]["card"]) == name]
        factors = [row["ours"] / row["modeled"] for row in own]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{MEASURED} can't be read ({error}): measure again, or remove it") from error
    return GPUS[name]._replace(products=products, measured=median(factors) if factors else None)


def gpu_of(card: str) -> str | None:
    """The name in GPUS of `NVIDIA H100 80GB HBM3`: `h100`; None for others and parts of one (MIG)."""
    words = card.lower().replace("-", " ").replace("_", " ").split()
    return None if "mig" in words else next((name for name in GPUS if name in words), None)


class Profile(Config):
    """Execution choices; `stages` overrides those of single stages, None follows from the cluster.
    Workers follow from its GPUs and their batch (`planning.shares`), threads from the node that works."""

    name: str = "auto"
    num_workers: int | None = Field(None, ge=1)
    min_workers: int | None = Field(None, ge=1)  # elastic: the number changes in a training
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    threads: int | None = Field(None, ge=1)
    reader_threads: int = Field(2, ge=1)
    max_failures: int = 3
    max_batch_per_device: int | None = None
    sharding: Sharding = "none"  # full: each worker holds a part of the weights; 8: of every 8
    aim: Aim = "knee"  # of the number of workers, where the GPU is known
    worker_start_timeout: int | None = Field(None, gt=0)  # seconds
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def resources(self, stage: str, **found: Any) -> Resources:
        """Resources of a stage: this profile's own values, over the values of `pipelines.planning.shares`.
        Raises ValidationError for a field that there is not, or a value that does not fit."""
        own = ("min_workers", "threads", "reader_threads", "max_failures", "max_batch_per_device", "sharding")
        said = {name: getattr(self, name) for name in own} | self.stages.get(stage, {})
        return Resources.model_validate({"num_workers": 1} | found | said)

    def given(self, stage: str, name: str) -> Any:
        """The profile's own value of a field, for this stage or all stages; None: the cluster decides."""
        return getattr(self.resources(stage) if name in self.stages.get(stage, {}) else self, name)

    def unused(self, names: Collection[str]) -> list[str]:
        """Warnings of `stages` outside a workflow's names; another recipe may have them."""
        lacking = [name for name in self.stages if name not in names]
        return [f"profile {self.name}: this recipe has no stage {name!r}{nearest(name, names)}" for name in lacking]


def load_profile(name_or_file: str, *, fastest: bool | None = None) -> Profile:
    """Load a built-in profile or a YAML file, with `fastest` or, False, cheapest as its aim.
    Raises UsageError with the nearest name or the bad field."""
    profiles = {
        "auto": Profile(),
        "laptop": Profile(name="laptop", num_workers=1, gpus_per_worker=0),
        "kuberay": Profile(name="kuberay", gpus_per_worker=1, cpus_per_worker=4, reader_threads=4),
    }
    changes = {} if fastest is None else {"aim": "fastest" if fastest else "cheapest"}
    if name_or_file in profiles:
        return profiles[name_or_file].replace(**changes)
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no profile {name_or_file!r}{nearest(name_or_file, profiles)}, or a YAML file")
    stage = ""  # whose settings are read; "": those of all
    try:
        profile = Profile.model_validate(
            {"name": path.stem, **(yaml.safe_load(path.read_text("utf-8")) or {}), **changes}
        )
        for stage in ("", *profile.stages):
            profile.resources(stage)
    except (ValidationError, TypeError, yaml.YAMLError, UnicodeDecodeError) as error:
        place, fields = (f"stages.{stage}: ", Resources) if stage else ("", Profile)
        raise UsageError(f"profile {path}: {place}{explain(error, fields)}") from error
    return profile


def storage_uri(flag: str | None) -> str:
    """The root of all artifacts: the flag, `CASCADE_STORAGE`, or ./runs."""
    return absolute(flag or os.environ.get("CASCADE_STORAGE") or "runs")


def tracking_uri(flag: str | None) -> str | None:
    """MLflow's address: the flag, `MLFLOW_TRACKING_URI`, or a SQLite file in ./runs; None for `none`."""
    uri = flag or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{absolute('runs')}/mlflow.db"
    if "://" not in uri and re.match(r"[\w.-]+:\d+(/|$)|https?\b", uri):  # it would be a folder of that name
        raise UsageError(f"MLflow's address {uri} has no protocol: write http://HOST:PORT")
    return None if uri == "none" else uri


class Cluster(NamedTuple):
    """CPUs and GPUs of all nodes together."""

    cpus: float  # logical CPUs
    gpus: float = 0
    cpus_per_gpu: float | None = None  # fewest of a node with GPUs; None: not known
    nodes: int = 1  # that have CPUs
    cpus_per_core: int = 1  # logical CPUs that stand for one core
    here: bool = False  # Ray is started on this machine and has nothing else
    gpu: GPU | None = None  # that all of them are; None: not known
    node_gpus: float = NODE_GPUS  # of a node, or of a pod
    network: Network = "tcp"

    @property
    def known_gpu(self) -> GPU:
        """The GPU, where it is known."""
        assert self.gpu is not None
        return self.gpu


def found_cluster(*, here: bool) -> Cluster:
    """The current nodes of the joined or started Ray."""
    import ray  # here, for commands that only read storage work without it

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    own, resources = nodes[ray.get_runtime_context().get_node_id()], nodes.values()
    with_gpus = [node for node in resources if node.get("GPU", 0) > 0]
    ratios = [node.get("CPU", 0) / node["GPU"] for node in with_gpus]
    cards = {key.partition(":")[2] for node in with_gpus for key in node if key.startswith("accelerator_type:")}
    name = gpu_of(cards.pop()) if len(cards) == 1 else None
    return Cluster(
        cpus=sum(node.get("CPU", 0) for node in resources),
        gpus=sum(node.get("GPU", 0) for node in resources),
        cpus_per_gpu=min(ratios, default=None),
        nodes=max(1, sum(node.get("CPU", 0) > 0 for node in resources)),
        cpus_per_core=max(1, int(own.get("CPU", 0) // (os.cpu_count() or 1))),
        here=here,
        gpu=None if name is None else gpu_named(name),
        node_gpus=max((node["GPU"] for node in with_gpus), default=NODE_GPUS),
    )


def this_machine() -> Cluster:
    """The cluster of a Ray on this machine, without asking Ray."""
    import torch  # here, for `--help` and `cascade data` work without it

    gpus = usable_gpus()
    known = gpu_named(name) if gpus and (name := gpu_of(torch.cuda.get_device_name(0))) else None
    return Cluster(local_cpus(), gpus=gpus, cpus_per_core=CPUS_PER_CORE, here=True, gpu=known, node_gpus=gpus)


def usable_gpus() -> int:
    """Number of this machine's GPUs that torch can use; Ray counts Apple's too, and trainings fail there."""
    import torch  # here, for `--help` and `cascade data` work without it

    return torch.cuda.device_count()


def local_cpus() -> int:
    """Logical CPUs of a Ray on this machine: enough tokens for several branches and their readers."""
    return CPUS_PER_CORE * max(2, psutil.cpu_count() or 1)


def parse_cluster(text: str) -> Cluster:
    """Parses a cluster elsewhere, `gpus=64,cpus=512,type=h100,network=efa`. Raises UsageError in one line.
    Without cpus there are 8 for each GPU, without gpus there are none; nodes have 8 GPUs and, without network, TCP."""
    words: dict[str, str] = {}
    for item in text.split(","):
        name, _, word = (part.strip() for part in item.partition("="))
        if name not in (known := ("gpus", "cpus", "type", "network")):
            raise UsageError(f"--cluster {text!r}: unknown {name!r}{nearest(name, known)}; as gpus=64,cpus=512")
        if name in words or (name in ("gpus", "cpus") and not re.fullmatch(r"[0-9]{1,9}", word)):
            raise UsageError(f"--cluster {text!r}: {name} needs one whole number, not {word!r}; as gpus=64,cpus=512")
        words[name] = word
    gpus = int(words.get("gpus", 0))
    cpus = int(words.get("cpus", CPUS_PER_GPU * gpus))
    if cpus == 0:
        raise UsageError(f"--cluster {text!r}: a cluster needs CPUs; as gpus=64,cpus=512")
    network: Any = words.get("network", "tcp")
    if network not in (networks := get_args(Network)):
        raise UsageError(f"--cluster {text!r}: network is {', '.join(networks)}, not {network!r}")
    gpu = gpu_named(words["type"], option=f"--cluster {text!r}") if "type" in words else None
    return Cluster(cpus, gpus, gpu=gpu, network=network)
