"""The training stream of a rank: its share of each global batch, read by Ray Data on its own node.

A rank has one reader, the actor of a Ray Data pool. It makes blocks of rows from shards that it fetches and decodes in
threads, and holds a shard while samples of it are due. A task of the reader is a stretch of steps: a reader that died
makes no more than a stretch again. Positions alone say which samples a rank gets (`order.py`). Where nothing is
decoded, as of tokens, a thread of the rank is the reader: Ray Data would take ten times the CPU time.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, ExecutionOptions, ExecutionResources
from ray.exceptions import RayTaskError

from components.data.listing import ShardError
from components.data.order import Order
from components.runtime.ray_internals import ExecutionCallback, quiet_ray_data

Arrays = dict[str, np.ndarray]
BLOCK_ROWS = 512  # blocks cost a few milliseconds each, whatever their size
BLOCK_BYTES = 16 * 2**20
AHEAD_BLOCKS = 16  # finished ones that wait for training
THREAD_BLOCKS = 2  # of them where a thread of the rank makes blocks
PREFETCHED_BATCHES = 4
TASK_ROWS = 16384
MOST_TASKS = 1000  # Ray makes all of a dataset before the first one runs
SOON_ROWS = 2048  # rows after a block whose shards are fetched ahead
SPARE_BYTES = 192 * 2**20  # shards that are kept although no sample of them is due soon
SHORTEST_REST = 0.005  # seconds; while a rank waits for a block
LONGEST_REST = 0.1  # seconds; once no rank has waited for a while


class Shard(Protocol):
    """The training samples of a shard, in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes held by the shard."""

    def fill(self, rows: Arrays, where: np.ndarray, ordinals: np.ndarray) -> None:
        """Sets rows[column][where], (n, ...), to the samples `ordinals`, (n,). Raises ShardError."""


class Samples(Protocol):
    """The training samples of a set as columns; picklable."""

    decoded: ClassVar[bool]  # in the shards already: rows are copies

    @property
    def counts(self) -> np.ndarray:  # int64 (S,)
        """Training samples of each shard."""

    def empty(self, rows: int) -> Arrays:
        """Columns of so many rows; `position` is one of them."""

    def open(self, shard: int) -> Shard:
        """The shard of a number, fetched and verified. Raises ShardError."""

    def complete(self, rows: Arrays) -> Arrays:
        """The filled rows, with columns that are made from others."""


class Share(NamedTuple):
    """The part of a training's samples that one rank reads."""

    global_batch_size: int
    seed: int
    streams: int
    total_steps: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.global_batch_size // self.world_size

    def positions(self, first: int, stop: int) -> np.ndarray:  # int64 (rows of these steps,)
        """Positions of the rank's rows in the steps [first, stop)."""
        return np.arange(first * self.global_batch_size + self.rank, stop * self.global_batch_size, self.world_size)


class Layout(NamedTuple):
    """Cut of a share into blocks and tasks; no choice here changes a row."""

    block_steps: int
    task_steps: int
    block_bytes: int

    @classmethod
    def of(cls, samples: Samples, share: Share) -> Self:
        """The cut of so many steps into blocks of a fair size and a bounded number of tasks."""
        row_bytes = sum(column.nbytes for column in samples.empty(1).values())
        steps = max(1, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes) // share.rows)
        fewest = math.ceil((share.total_steps - share.start_step) / (steps * MOST_TASKS))
        tasks = max(1, TASK_ROWS // (steps * share.rows), fewest)
        return cls(steps, tasks * steps, steps * share.rows * row_bytes)


class RankReader:
    """Makes the rows of a share, and holds the shards that are due. `threads` fetch, as many decode."""

    def __init__(self, samples: Samples, share: Share, *, layout: Layout, threads: int = 2) -> None:
        self.samples, self.share, self.layout = samples, share, layout
        self.order = Order(samples.counts, seed=share.seed, streams=share.streams)
        self.shards: OrderedDict[int, Future[Shard]] = OrderedDict()  # used last: last
        self.fetching, self.filling = ThreadPoolExecutor(threads), ThreadPoolExecutor(threads)

    def __call__(self, task: dict[str, np.ndarray]) -> Iterator[Arrays]:
        """Yields the blocks of the task number `item`. Raises ShardError."""
        first = self.share.start_step + int(task["item"][0]) * self.layout.task_steps
        stop = min(first + self.layout.task_steps, self.share.total_steps)
        for step in range(first, stop, self.layout.block_steps):
            yield self.rows(step, min(step + self.layout.block_steps, stop))

    def rows(self, first: int, stop: int) -> Arrays:
        """The rows of the steps [first, stop). Raises ShardError."""
        share, positions = self.share, self.share.positions(first, stop)
        following = share.positions(stop, stop + math.ceil(max(SOON_ROWS, share.streams) / share.rows))
        places, soon = self.order.locate(positions), self.order.locate(following).shards
        due = np.unique(places.shards)
        self.hold(due.tolist(), np.unique(soon).tolist())
        rows = self.samples.empty(len(positions))
        rows["position"][:] = positions

        def fill(shard: int) -> None:
            (where,) = np.nonzero(places.shards == shard)
            self.shards[shard].result().fill(rows, where, places.ordinals[where])

        for _ in self.filling.map(fill, due.tolist()):  # raises what a thread raised
            pass
        return self.samples.complete(rows)

    def hold(self, due: Sequence[int], soon: Sequence[int]) -> None:
        """Fetches the shards that are due and those due soon; drops others, longest unused first."""
        for shard in (*due, *soon):
            if shard not in self.shards:
                self.shards[shard] = self.fetching.submit(self.samples.open, shard)
        for shard in (*soon, *due):
            self.shards.move_to_end(shard)
        needed = {*due, *soon}
        spare = [shard for shard, coming in self.shards.items() if shard not in needed and coming.done()]
        held = sum(self.shards[shard].result().nbytes for shard in spare)
        while held > SPARE_BYTES:
            held -= self.shards.pop(spare.pop(0)).result().nbytes


class Rest(ExecutionCallback):
    """Rests between the steps of Ray Data's loop, which waits for tasks and not for consumers.
    It would spin while training is slower than reading (ray 2.60). Rests grow while the rank does not wait."""

    rest = SHORTEST_REST

    def on_execution_step(self, executor: Any) -> None:  # Ray's StreamingExecutor
        self.rest = SHORTEST_REST if executor._consumer_idling() else min(2 * self.rest, LONGEST_REST)
        time.sleep(self.rest)


def rank_batches(
    samples: Samples,
    *,
    global_batch_size: int,
    seed: int,
    streams: int,
    total_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
) -> Iterator[Arrays]:
    """Batches of the steps [start_step, total_steps) of a rank, read on the calling process's node.
    `global_batch_size`: samples a step over all ranks; a multiple of `world_size`. `streams`: C of the order; each
    sample is read once an epoch where `world_size` divides C. `threads`: of the reader. Raises ValueError for a batch
    that does not divide, or a set without training samples; ShardError."""
    if global_batch_size % world_size:
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {world_size} workers")
    if not any(samples.counts):
        raise ValueError("the set has no training samples: lower holdout_fraction")
    share = Share(global_batch_size, seed, streams, total_steps, start_step, rank, world_size)
    make = _thread_batches if samples.decoded else _ray_batches
    yield from make(samples, share, layout=Layout.of(samples, share), threads=threads)


def _thread_batches(samples: Samples, share: Share, *, layout: Layout, threads: int) -> Iterator[Arrays]:
    reader = RankReader(samples, share, layout=layout, threads=threads)
    firsts = iter(range(share.start_step, share.total_steps, layout.block_steps))
    with ThreadPoolExecutor(1) as maker:

        def make(first: int) -> Future[Arrays]:
            return maker.submit(reader.rows, first, min(first + layout.block_steps, share.total_steps))

        coming = deque(map(make, islice(firsts, THREAD_BLOCKS)))
        while coming:
            rows = coming.popleft().result()
            coming.extend(map(make, islice(firsts, 1)))
            for start in range(0, len(rows["position"]), share.rows):
                yield {name: column[start : start + share.rows] for name, column in rows.items()}


def _ray_batches(samples: Samples, share: Share, *, layout: Layout, threads: int) -> Iterator[Arrays]:
    quiet_ray_data()
    count = share.total_steps - share.start_step
    tasks = list(range(math.ceil(count / layout.task_steps)))
    dataset = ray.data.from_items(tasks, override_num_blocks=max(1, len(tasks))).map_batches(
        RankReader,
        fn_constructor_args=(samples, share),
        fn_constructor_kwargs={"layout": layout, "threads": threads},
        batch_size=1,
        compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),  # in order, after a death too
        num_cpus=0,  # on those of its rank, which never waits for room for its reader
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    context = dataset.context
    ahead = ExecutionResources.for_limits(object_store_memory=AHEAD_BLOCKS * layout.block_bytes)
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ahead)
    context.custom_execution_callback_classes = [Rest]
    context._max_num_blocks_in_streaming_gen_buffer = AHEAD_BLOCKS
    context.target_max_block_size = int(0.8 * layout.block_bytes)  # blocks stay whole
    context.enable_progress_bars = context.print_on_execution_start = False
    batches = dataset.iter_batches(batch_size=share.rows, batch_format="numpy", prefetch_batches=PREFETCHED_BATCHES)
    try:
        yield from islice(batches, count)
    except ShardError as error:  # Ray Data adds advice of its own
        raise ShardError(str(error.cause if isinstance(error, RayTaskError) else error).partition("\n")[0]) from None
