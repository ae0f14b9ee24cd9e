"""Crews: neighboring ranks that share blocks, for little work at the process that hands blocks out.

That process takes a few milliseconds for each block of any size: at 512 ranks, with a block for each, 1.6 s for each
group of steps. So from nine ranks on, ranks form crews of equal size. A block holds the rows of a whole crew, the first
rank's first. The crew's dealer, an actor of its own, takes the block and tells each rank of the crew where it lies; a
rank then reads its own rows in the shared memory of its node. Ranks of a node are neighbors (Ray Train numbers them
so): a node fetches rows of other nodes only where its crew spans several nodes. And a block holds as many steps as keep
both processes below STEP_SECONDS. Growing blocks alone would not do: at 512 ranks a reading task would make 160 steps.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import ray.train
from ray.data import DataIterator, Dataset
from ray.data.block import BlockAccessor

from components.runtime.ray_internals import RefBundle, StreamSplitDataIterator

FEWEST_CREWS, MOST_CREWS, RANKS_OF_NODE = 8, 16, 8  # between the two numbers, a crew is a node of eight GPUs
AHEAD_BLOCKS = 1  # blocks that wait in the dealer for each rank; each rank fetches another one ahead
STEP_SECONDS = 0.01  # limit of a process that hands out, for each step: with more than a step's time, ranks would wait
BLOCK_SECONDS = 3.1e-3  # CPU time for each block in the process that hands blocks out (ray 2.60, two cores of a Xeon)
HAND_SECONDS = 0.5e-3  # CPU time of a dealer for each block and rank; to get the block takes BLOCK_SECONDS at most
Hand = queue.Queue[RefBundle | BaseException | None]  # queue of a rank: blocks, then None or the error of the end


def count_crews(world_size: int) -> int:
    """Number of crews of equal size; up to FEWEST_CREWS ranks, each rank is a crew.

    A number of ranks without a near divisor is a single crew, whose nodes fetch the rows of all.
    """
    most = min(max(FEWEST_CREWS, world_size // RANKS_OF_NODE), MOST_CREWS)
    return max(crews for crews in range(1, most + 1) if world_size % crews == 0)


def fewest_steps(world_size: int) -> int:
    """The least steps of a block for no process to take more than STEP_SECONDS a step to hand out."""
    crews = count_crews(world_size)
    dealer = 0.0 if crews == world_size else BLOCK_SECONDS + world_size // crews * HAND_SECONDS
    return math.ceil(max(crews * BLOCK_SECONDS, dealer) / STEP_SECONDS)


def split_stream(dataset: Dataset, *, world_size: int) -> list[DataIterator]:
    """An iterator for each rank of a `training_stream`. Picklable; all ranks must iterate."""
    crews = count_crews(world_size)
    splits = dataset.streaming_split(crews, equal=False)
    if crews == world_size:
        return splits
    return [member for split in splits for member in crew_of(split, world_size // crews)]


def crew_of(blocks: DataIterator, size: int) -> list[DataIterator]:
    """Iterators of the `size` ranks of a crew, for the blocks of a split."""
    dealer = ray.remote(CrewDealer).options(num_cpus=0, max_concurrency=size + 1, scheduling_strategy="SPREAD")
    actor = dealer.remote(blocks, size)
    return [CrewMember(actor, place, size) for place in range(size)]


class CrewMember(StreamSplitDataIterator):
    """The iterator of a rank: Ray Data's own, with a dealer in the place of the coordinator."""

    def iter_batches(self, *, batch_size: int, prefetch_batches: int = 1, **unused: object) -> Iterator[dict[str, Any]]:
        """Batches of the rank as arrays, without copies of other ranks' rows; a block is fetched ahead.

        Args:
            batch_size: divides the rows that a rank has in a block.
        """
        for block in super().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            rows = block.num_rows // self._world_size
            for first in range(self._output_split_idx * rows, (self._output_split_idx + 1) * rows, batch_size):
                yield BlockAccessor.for_block(block.slice(first, batch_size)).to_batch_format("numpy")


class CrewDealer:
    """The actor that hands each block of a crew to all ranks, with the methods of Ray's coordinator."""

    def __init__(self, blocks: DataIterator, size: int) -> None:
        self.blocks = blocks
        self.hands: list[queue.Queue[RefBundle | BaseException | None]] = [
            queue.Queue(AHEAD_BLOCKS) for _ in range(size)
        ]
        self.finished: set[int] = set()
        self.lock, self.dealing = threading.Lock(), threading.Thread(target=self.deal, daemon=True)

    def start_epoch(self, place: int) -> int:
        """Called once by each rank, before any block; the first call starts the dealing."""
        with self.lock:
            if self.dealing.ident is None:
                self.dealing.start()
        return 0

    def get(self, epoch: int, place: int, prefetched_bytes: int = 0) -> RefBundle | None:
        """The next block for the rank at `place`, None at the end. Raises an error of reading."""
        block = self.hands[place].get()
        if isinstance(block, BaseException):
            raise block
        return block

    def deal(self) -> None:
        """Give every block to every rank; no rank is more than AHEAD_BLOCKS ahead of another."""
        last: BaseException | None = None
        try:
            for block in self.blocks._to_ref_bundle_iterator()[0]:
                for hand in self.hands:
                    hand.put(block)
        except Exception as error:  # any error of reading: the ranks raise it
            last = error
        for hand in self.hands:
            hand.put(last)

    def notify_split_finished(self, epoch: int, place: int) -> None:
        """Called by a rank after its last step; after the last rank's call reading ends."""
        self.finished.add(place)
        if len(self.finished) == len(self.hands):
            self.blocks._on_iteration_end(None)

    def shutdown_executor(self) -> None:
        """Called by Ray Train when workers are gone; reading ends."""
        ray.get(self.blocks._coord_actor.shutdown_executor.remote())

    def get_dataset_context(self) -> Any:  # Ray's DataContext
        return self.blocks.get_context()

    def get_dataset_tag(self, place: int) -> dict[str, str]:
        return self.blocks._get_dataset_tag()


def crew_rows(column: np.ndarray, *, crew: int, world_size: int, steps: int) -> np.ndarray:
    """Rows of a crew, (K n m, ...) -> (K m n / crews, ...): rank after rank, the slices of K steps."""
    crews = count_crews(world_size)
    ranks = column.reshape(steps, crews, world_size // crews, -1, *column.shape[1:])[:, crew]
    return ranks.swapaxes(0, 1).reshape(-1, *column.shape[1:])


MakeDataset = Callable[..., Dataset]  # called with world_size=


class OrderedShards(ray.train.DataConfig):
    """Hands block i to crew i mod the number of crews, the order of a global batch. Without torch."""

    def configure(
        self, datasets: dict[str, MakeDataset], world_size: int, *unused: Any, **also_unused: Any
    ) -> list[dict[str, DataIterator]]:
        """The iterators of each rank, with order preserved."""
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, make in datasets.items():
            dataset = make(world_size=world_size)
            dataset.context.execution_options.preserve_order = True
            for shard, split in zip(shards, split_stream(dataset, world_size=world_size), strict=True):
                shard[name] = split
        return shards
