"""What a stage is given to work with: its share of the machine, which never enters its identity."""

from typing import Literal

from pydantic import Field

from components.configuration.config import Config

Sharding = Literal["none", "full"]


class Profiling(Config):
    """Steps of each training that torch.profiler records."""

    first_step: int = Field(ge=1)
    last_step: int = Field(ge=1)  # recorded too
    folder: str  # URI where traces go


class Resources(Config):
    """The share of the cluster that one stage may use."""

    num_workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)  # where there is no room for all; None: never fewer
    num_actors: int = Field(1, ge=1)  # of a pool that works shards or images off one by one
    cpus_per_worker: float = Field(1, gt=0)  # logical CPUs (Ray's tokens), not cores
    gpus_per_worker: float = Field(0, ge=0)
    threads: int | None = Field(1, ge=1)  # torch threads of each worker; equal bits need equal threads. None: as many
    # as the node that works has for it (`components.runtime.node`), where `workers_per_node` such may share its cores
    workers_per_node: int = Field(1, ge=1)
    cpus_per_core: int = Field(1, ge=1)  # logical CPUs that Ray counts for one core
    low_priority: bool = False  # a training that lets others go first on cores that they share: nothing waits for it
    readers: int = Field(2, ge=1)  # tasks of a training's stream that read and decode at a time
    reader_cpus: float = Field(0.5, gt=0)  # logical CPUs of one task that reads and decodes shards
    max_failures: int = Field(3, ge=-1)  # restarts of a gang that lost a worker; -1 for ever
    max_batch_per_device: int | None = Field(None, ge=1)  # larger shares are taken in parts; None: as GPUs have room
    sharding: Sharding = "none"  # of a training: "full": workers hold a part each of all weights, moments and averages
    profiling: Profiling | None = None  # no profile's: of one run

    def worker_counts(self, global_batch_size: int) -> list[int]:
        """Numbers of workers that a training may have, ascending: those that share its batch equally."""
        least = self.min_workers or self.num_workers
        return [count for count in range(least, self.num_workers + 1) if global_batch_size % count == 0]
