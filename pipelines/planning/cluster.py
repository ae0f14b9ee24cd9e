"""What there is to share: CPUs and GPUs of the Ray that was joined or started, or of a cluster that is not here."""

import os
import re
from typing import NamedTuple

import psutil
import ray

from components.configuration.usage import UsageError, nearest

CPUS_PER_CORE = 4  # logical CPUs of a Ray that is started here
CPUS_PER_GPU = 8  # of a cluster of which GPUs alone are told: those of a pod in infra/kuberay


class Cluster(NamedTuple):
    """What all nodes have together."""

    cpus: float  # logical ones
    gpus: float = 0
    cpus_per_gpu: float | None = None  # fewest that a node with GPUs has for each of them; None: nobody knows
    nodes: int = 1  # that have CPUs
    cpus_per_core: int = 1  # logical CPUs that stand for one core
    here: bool = False  # Ray is started on this machine and has nothing else


def found_cluster(*, here: bool) -> Cluster:
    """What the nodes of the Ray that was joined or started have now."""
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
    """What a Ray that is started here would have; Ray isn't asked."""
    return Cluster(local_cpus(), gpus=usable_gpus(), cpus_per_core=CPUS_PER_CORE, here=True)


def usable_gpus() -> int:
    """GPUs of this machine that torch can use. Ray's own count has Apple's too, and those that a torch without CUDA
    leaves idle: trainings would ask CUDA for them and fail."""
    import torch  # here, for `--help` and `cascade data` work without it

    return torch.cuda.device_count()


def local_cpus() -> int:
    """Logical CPUs of a Ray that is started here: tokens, of which several branches and their readers all need some."""
    return CPUS_PER_CORE * max(2, psutil.cpu_count() or 1)


def parse_cluster(text: str) -> Cluster:
    """A cluster that is not here, as `gpus=64,cpus=512`. Raises UsageError in one line.

    Without cpus there are 8 for each GPU, without gpus there are none.
    """
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
