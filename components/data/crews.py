"""Ranks next to each other share blocks, so that the one process that hands blocks out has little work however many
ranks there are.

That process takes a few milliseconds for each block, whatever is in it: at 512 ranks, with a block for each, 1.6 s for
each group of steps. So from nine ranks on they form crews of equal size. A block holds the rows of a whole crew, its
first rank's first. The crew's dealer, an actor of its own, takes it and tells each of its ranks where it lies; a rank
then reads its own rows in the shared memory of its node. Ranks of a node are next to each other (Ray Train numbers them
so): a node fetches rows of others only where its crew spans several nodes. And a block holds as many steps as keep both
processes below STEP_SECONDS. Growing blocks alone would not do: at 512 ranks a reading task would make 160 steps.
"""

import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from ray.data import DataIterator, Dataset
from ray.data.block import BlockAccessor

from components.runtime.ray_internals import RefBundle, StreamSplitDataIterator

FEWEST_CREWS, MOST_CREWS, RANKS_OF_NODE = 8, 16, 8  # between the two numbers, a crew is a node of eight GPUs
AHEAD_BLOCKS = 1  # that wait in the dealer for each rank; each rank fetches one ahead too
STEP_SECONDS = 0.01  # what a process that hands out may take for a step: if it took more than a step, ranks would wait
BLOCK_SECONDS = 3.1e-3  # CPU time of the process that hands out blocks, for each (ray 2.60, two cores of a Xeon)
HAND_SECONDS = 0.5e-3  # CPU time of a dealer for each block and rank; it takes BLOCK_SECONDS at most to get the block
Hand = queue.Queue[RefBundle | BaseException | None]  # what waits for one rank: blocks, then the end or why it came


def count_crews(world_size: int) -> int:
    """Crews of equal size; up to FEWEST_CREWS ranks each is a crew of its own. A number of ranks with no divisor near
    is one crew: its nodes fetch the rows of all."""
    most = min(max(FEWEST_CREWS, world_size // RANKS_OF_NODE), MOST_CREWS)
    return max(crews for crews in range(1, most + 1) if world_size % crews == 0)


def fewest_steps(world_size: int) -> int:
    """How many steps a block must hold for no process to take more than STEP_SECONDS a step to hand them out."""
    crews = count_crews(world_size)
    dealer = 0.0 if crews == world_size else BLOCK_SECONDS + world_size // crews * HAND_SECONDS
    return math.ceil(max(crews * BLOCK_SECONDS, dealer) / STEP_SECONDS)


def split_stream(dataset: Dataset, *, world_size: int) -> list[DataIterator]:
    """One iterator for each rank of a `training_stream`. Picklable; all ranks must iterate."""
    crews = count_crews(world_size)
    splits = dataset.streaming_split(crews, equal=False)
    if crews == world_size:
        return splits
    return [member for split in splits for member in crew_of(split, world_size // crews)]


def crew_of(blocks: DataIterator, size: int) -> list[DataIterator]:
    """What the `size` ranks iterate that share the blocks of one split."""
    dealer = ray.remote(CrewDealer).options(num_cpus=0, max_concurrency=size + 1, scheduling_strategy="SPREAD")
    actor = dealer.remote(blocks, size)
    return [CrewMember(actor, place, size) for place in range(size)]


class CrewMember(StreamSplitDataIterator):
    """What one rank of a crew iterates: Ray Data's own iterator, with a dealer in the place of its coordinator."""

    def iter_batches(self, *, batch_size: int, prefetch_batches: int = 1, **unused: object) -> Iterator[dict[str, Any]]:
        """The batches of this rank, as arrays, with no row of another copied; at least one block is fetched ahead.

        Args:
            batch_size: divides the rows that a rank has in a block.
        """
        for block in super().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            rows = block.num_rows // self._world_size
            for first in range(self._output_split_idx * rows, (self._output_split_idx + 1) * rows, batch_size):
                yield BlockAccessor.for_block(block.slice(first, batch_size)).to_batch_format("numpy")


class CrewDealer:
    """Takes the blocks of a crew and hands each to all its ranks. An actor, with what `CrewMember` asks of one."""

    def __init__(self, blocks: DataIterator, size: int) -> None:
        self.blocks = blocks
        self.hands: list[queue.Queue[RefBundle | BaseException | None]] = [
            queue.Queue(AHEAD_BLOCKS) for _ in range(size)
        ]
        self.finished: set[int] = set()
        self.lock, self.dealing = threading.Lock(), threading.Thread(target=self.deal, daemon=True)

    def start_epoch(self, place: int) -> int:
        """Called once by each rank, before it asks for blocks."""
        with self.lock:
            if self.dealing.ident is None:
                self.dealing.start()
        return 0

    def get(self, epoch: int, place: int, prefetched_bytes: int = 0) -> RefBundle | None:
        """The next block for the rank at `place`, None at the end. Raises what reading raised."""
        found = self.hands[place].get()
        if isinstance(found, BaseException):
            raise found
        return found

    def deal(self) -> None:
        """Give every block to every rank; none is more than AHEAD_BLOCKS ahead of another."""
        last: BaseException | None = None
        try:
            for block in self.blocks._to_ref_bundle_iterator()[0]:
                for hand in self.hands:
                    hand.put(block)
        except Exception as error:  # what reading raised, whatever it is: the ranks are told
            last = error
        for hand in self.hands:
            hand.put(last)

    def notify_split_finished(self, epoch: int, place: int) -> None:
        """A rank has taken all its steps; when all have, reading ends."""
        self.finished.add(place)
        if len(self.finished) == len(self.hands):
            self.blocks._on_iteration_end(None)

    def shutdown_executor(self) -> None:
        """Called by Ray Train when workers are gone: reading ends."""
        ray.get(self.blocks._coord_actor.shutdown_executor.remote())

    def get_dataset_context(self) -> Any:  # Ray's DataContext
        return self.blocks.get_context()

    def get_dataset_tag(self, place: int) -> dict[str, str]:
        return self.blocks._get_dataset_tag()


def crew_rows(column: np.ndarray, *, crew: int, world_size: int, steps: int) -> np.ndarray:
    """(K n m, ...) -> (K m n / crews, ...): for each rank of the crew, one after the other, its slices of K steps."""
    crews = count_crews(world_size)
    ranks = column.reshape(steps, crews, world_size // crews, -1, *column.shape[1:])[:, crew]
    return ranks.swapaxes(0, 1).reshape(-1, *column.shape[1:])
