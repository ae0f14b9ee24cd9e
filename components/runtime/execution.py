"""The share of the cluster for a stage. Never part of a stage's identity."""

import os
from typing import Annotated, Literal

from pydantic import Field

from components.configuration.config import Config

# Workers among whom networks are cut: none, all, or so many that stand together, such as those of a node.
Sharding = Literal["none", "full"] | Annotated[int, Field(ge=2)]


class Profiling(Config):
    """Steps of each training for torch.profiler to record."""

    first_step: int = Field(ge=1)
    last_step: int = Field(ge=1)  # inclusive
    folder: str  # URI where traces go


class Resources(Config):
    """Workers, CPUs, GPUs and limits of a single stage."""

    num_workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)  # if num_workers find no room; None: never fewer
    num_actors: int = Field(1, ge=1)  # of a pool that processes shards or images
    cpus_per_worker: float = Field(1, gt=0)  # logical CPUs (Ray's tokens), not cores
    gpus_per_worker: float = Field(0, ge=0)
    threads: int | None = Field(1, ge=1)  # torch threads of each worker; equal bits need equal threads. None: the
    # worker's share of its node's cores (`threads_of`), where `workers_per_node` workers may share them
    workers_per_node: int = Field(1, ge=1)
    cpus_per_core: int = Field(1, ge=1)  # logical CPUs that Ray counts for one core
    low_priority: bool = False  # lets other trainings go first: no stage waits for this one
    reader_threads: int = Field(2, ge=1)  # that fetch and decode shards for a worker of a training, on its node
    max_failures: int = Field(3, ge=-1)  # restarts of a gang that lost a worker, without a new
    # checkpoint between; -1: without limit
    max_batch_per_device: int | None = Field(None, ge=1)  # larger shares are taken in parts; None: as GPUs have room
    sharding: Sharding = "none"  # else each worker holds a part of all weights, moments and averages
    profiling: Profiling | None = None  # set by a run, never by a profile

    def worker_counts(self, global_batch_size: int) -> list[int]:
        """Numbers of workers, ascending, that divide a training's batch and hold whole copies of networks."""
        counts = range(self.min_workers or self.num_workers, self.num_workers + 1)
        return [n for n in counts if global_batch_size % n == 0 and n % self.shards(n) == 0]

    def shards(self, workers: int) -> int:
        """Workers, of so many, among whom networks are cut; 1: each holds all."""
        if isinstance(self.sharding, int):
            return self.sharding
        return workers if self.sharding == "full" else 1


def node_threads(resources: Resources) -> int:
    """Torch threads of a worker on the calling node: `resources.threads`, or a share of the node's cores."""
    import ray  # nothing else here needs Ray

    if resources.threads is not None:
        return resources.threads
    here = ray.get_runtime_context().get_node_id()
    node = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return threads_of(resources, cpus=node.get("CPU", 0), gpus=node.get("GPU", 0), cores=os.cpu_count() or 1)


def threads_of(resources: Resources, *, cpus: float, gpus: float, cores: int) -> int:
    """A worker's share of a node's cores, at least 1: a function of the node alone, equal at each start.
    Other work on the node does not count, or a restart would have other bits. A worker on GPUs gets the share of the
    cores that its GPUs are of the node's; on other nodes as many workers share the cores as may come to work there.
    `cpus`: logical CPUs that Ray counts on the node, in a pod fewer than the machine's `cores`, else maybe more."""
    room = max(1, cpus // resources.cpus_per_worker)  # workers for whom the node has logical CPUs
    workers = min(resources.workers_per_node, room)
    if resources.gpus_per_worker and gpus:
        workers = max(1, gpus / resources.gpus_per_worker)
    return max(1, int(min(cores, cpus) / workers))
