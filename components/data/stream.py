"""The training stream as a Ray Data dataset: ranks receive slices of global batches, in order.

A reading task makes a chunk: several groups of K consecutive global batches. From each group it emits one block for
each crew of ranks (`crews.py`; up to eight ranks, each rank is a crew), the block of rank 0 first, with the K slices of
each rank in the crew (K m rows a rank, m = global batch / ranks). With `preserve_order` the splitter hands blocks out
in order to the crew with the fewest rows, ties to the lowest, and so block i goes to crew i mod the number of crews.
Every block has the same number of bytes, and `target_max_block_size` is set just below that number, so that Ray Data
passes blocks on unchanged (a block is sliced only from 1.5 times the target).

Ray 2.60 makes all read tasks of a dataset before the first one runs: a million steps would be hundreds of thousands of
objects in its store. Here Ray gets the first, and each further task when the earlier ones have been taken (`Feeder`).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from ray.data import DataIterator, Dataset, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.context import DataContext

from components.data.crews import count_crews, crew_rows, fewest_steps
from components.data.decoded import shard_cache
from components.data.images import Degradation, degrade
from components.data.order import ShuffleWindow, pick, windows
from components.data.shards import Member, ShardEntry, ShardIndex, View
from components.runtime.ray_internals import BlockEntry, ExecutionCallback, InputDataBuffer, RefBundle

SHORTEST_REST = 0.005  # seconds; while a rank waits for a block
LONGEST_REST = 0.2  # seconds; once no rank has waited for a while: a block holds several steps
KEPT = 256  # read tasks that Ray may have to run again, for blocks that were lost before they were taken


class Feeder(ExecutionCallback):
    """Feeds the read operator of a StreamDatasource task by task, and rests between the steps of the loop.
    The loop waits for tasks and not for consumers: it would spin for as long as training is slower than reading (ray
    2.60, streaming_executor.py). So rests grow while no rank waits, and a waiting rank makes them short again. Ray's
    input operator counts as finished from the start; here it finishes after the last task."""

    def before_execution_starts(self, executor: Any) -> None:  # Ray's StreamingExecutor
        topology = executor._topology or {}
        self.input = next(op for op in topology if isinstance(op, InputDataBuffer))
        source = self.input._logical_operators[0].datasource
        assert isinstance(source, StreamDatasource)
        self.ahead, self.tasks, self.rest = source.ahead, islice(source.tasks(), 1, None), SHORTEST_REST
        self.input._is_execution_marked_finished = self.input._inputs_complete = False
        topology[self.input].inputs_done_called = True

    def on_execution_step(self, executor: Any) -> None:
        while not self.input.has_execution_finished() and self.waiting() < self.ahead:
            self.feed()
        self.rest = SHORTEST_REST if executor._consumer_idling() else min(2 * self.rest, LONGEST_REST)
        time.sleep(self.rest)

    def waiting(self) -> int:
        """Number of tasks handed over and not run yet."""
        (reading,) = self.input.output_dependencies
        return len(self.input._input_data) - reading.metrics.num_inputs_received

    def feed(self) -> None:
        task = next(self.tasks, None)
        if task is None:
            self.input.mark_execution_finished()
            return
        metadata = BlockMetadata(num_rows=1, size_bytes=1024, exec_stats=None, input_files=None)
        tasks: list[RefBundle | None] = self.input._input_data
        tasks.append(RefBundle((BlockEntry(ray.put(task), metadata),), owns_blocks=False, schema=None))
        memory = KEPT + self.ahead  # tasks that wait to be run must stay, however many readers there are
        if len(tasks) > memory:
            tasks[-memory - 1] = None


GROUP_ROWS = 512  # blocks cost a few milliseconds each, whatever their size
GROUP_BYTES = 16 * 2**20
CHUNK_ROWS = 4096
CHUNK_BYTES = 128 * 2**20
PREFETCHED_BATCHES = 4  # of a rank
AHEAD_CHUNKS = 6  # finished chunks beside those in work: with fewer, readers of large images stop and start


@dataclass(frozen=True)
class Layout:
    """Cut of the stream into blocks; no choice here changes the sample that a rank sees at a step."""

    resolution: int
    global_batch_size: int
    world_size: int
    seed: int
    text_length: int
    member: Member = "image"
    condition_member: Member | None = None
    degradation: Degradation | None = None
    arrays: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name, shape

    @property
    def row_bytes(self) -> int:
        images = 3 * self.resolution**2 * (2 if self.has_condition else 1)
        arrays = sum(2 * math.prod(shape) for _, shape in self.arrays)
        return images + 8 * self.text_length + 16 + (0 if self.degradation is None else 8) + arrays

    @property
    def has_condition(self) -> bool:
        return self.condition_member is not None or self.degradation is not None

    @property
    def steps_per_group(self) -> int:
        rows = min(GROUP_ROWS, GROUP_BYTES // self.row_bytes)
        return max(fewest_steps(self.world_size), rows // self.global_batch_size)

    @property
    def group_rows(self) -> int:
        return self.steps_per_group * self.global_batch_size

    @property
    def chunk_rows(self) -> int:
        return max(self.group_rows, min(CHUNK_ROWS, CHUNK_BYTES // self.row_bytes))


class Chunk(NamedTuple):
    """The work of a reading task: positions [first, last), and their windows. Small, for pickling."""

    first: int
    last: int
    windows: tuple[tuple[ShuffleWindow, tuple[ShardEntry, ...]], ...]


def training_stream(
    index: ShardIndex,
    view: View,
    *,
    global_batch_size: int,
    world_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    degradation: Degradation | None = None,
    reader_cpus: float = 0.5,
    readers: int = 2,
) -> Dataset:
    """A dataset with the batches of steps [start_step, total_steps), for `split_stream`.

    Rows are `image` uint8 (H, W, 3), `label` int64, `text` int64 (L,), `position` int64; with a condition member or a
    degradation also `condition_image` uint8 (H, W, 3), with a degradation `task` int64; arrays of the set are float16
    under their names. The last group is filled up with the positions that follow, so ranks stop by count.

    Args:
        index: the set; its training split is read.
        global_batch_size: samples a step over all ranks; a multiple of `world_size`.
        seed: of the order, >= 0.
        start_step, total_steps: the steps to read; start_step < total_steps.
        degradation: makes the `condition_image` of the `image`; not together with a condition member.
        reader_cpus: logical CPUs of a reading task.
        readers: reading tasks at a time.

    Raises ValueError for a batch that does not divide, a set without training samples, or two condition images.
    Reading raises ShardError.
    """
    if global_batch_size % world_size:
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {world_size} workers")
    if not index.train_samples:
        raise ValueError(f"{index.source} has no training samples: lower holdout_fraction ({index.holdout_fraction})")
    if view.condition_member is not None and degradation is not None:
        raise ValueError(f"condition_image is either {view.condition_member} or a degraded image, not both")
    text_length = index.text.text_length
    columns = tuple((name, index.array(name).shape) for name in view.arrays)
    members = (view.member, view.condition_member)
    layout = Layout(view.resolution, global_batch_size, world_size, seed, text_length, *members, degradation, columns)
    source = StreamDatasource(index, layout, start_step=start_step, total_steps=total_steps, ahead=2 * readers)
    dataset = ray.data.read_datasource(source, num_cpus=reader_cpus, concurrency=readers, override_num_blocks=1)
    _configure(dataset.context, layout, readers)
    return dataset


def rank_batches(
    iterator: DataIterator, *, batch_size: int, steps: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one rank as arrays.

    `image` uint8 (m, H, W, 3), `label` (m,), `text` (m, L), `position` (m,) int64, and all else that the stream holds.

    Args:
        iterator: this rank's, from `split_stream`, or Ray Train's shard for it.
        batch_size: m, the global batch divided by the number of ranks.
        steps: batches to read, the same on all ranks; None: to the end of the stream.
    """
    batches = iterator.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=PREFETCHED_BATCHES)
    yield from islice(batches, steps)


def plan_chunks(index: ShardIndex, layout: Layout, *, start_step: int, total_steps: int) -> Iterator[Chunk]:
    """Cut the stream into the work of tasks, chunk by chunk on demand.
    The first chunk is one group, so that training starts early; a later chunk ends with the last window that fits into
    it, since each task that touches a window reads the window's shards."""
    counts = [entry.train_samples for entry in index.shards]
    num_groups = -(-(total_steps - start_step) // layout.steps_per_group)
    first, limit = start_step * layout.global_batch_size, layout.group_rows
    end = first + num_groups * layout.group_rows
    ahead = windows(counts, seed=layout.seed, start=first)
    held = [next(ahead)]
    while first < end:
        while held[-1].stop < first + limit + layout.group_rows:
            held.append(next(ahead))
        stop = max((window.stop for window in held if window.stop <= first + limit), default=first + limit)
        last = min(end, first + -(-(stop - first) // layout.group_rows) * layout.group_rows)
        used = [window for window in held if window.start < last]
        yield Chunk(first, last, tuple((w, tuple(index.shards[shard] for shard in w.shards)) for w in used))
        first, limit = last, layout.chunk_rows
        held = [window for window in held if window.stop > first] or [next(ahead)]


def read_chunk(header: ShardIndex, layout: Layout, chunk: Chunk) -> Iterator[Block]:
    """Yields the blocks of a chunk: for each group, a block for each crew. Raises ShardError."""
    for first in range(chunk.first, chunk.last, layout.group_rows):
        rows = _read_rows(header, layout, chunk, first)
        size = {"world_size": layout.world_size, "steps": layout.steps_per_group}
        for crew in range(count_crews(layout.world_size)):
            yield BlockAccessor.batch_to_block({name: crew_rows(x, crew=crew, **size) for name, x in rows.items()})


class StreamDatasource(Datasource):
    """Ray Data's view of the stream: read tasks, planned on demand for the callback `Feeder`."""

    def __init__(self, index: ShardIndex, layout: Layout, *, start_step: int, total_steps: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead  # read tasks that wait to be run
        self._index, self._layout, self._start_step, self._total_steps = index, layout, start_step, total_steps

    def get_name(self) -> str:
        return "TrainingStream"

    def estimate_inmemory_data_size(self) -> int:
        return (self._total_steps - self._start_step) * self._layout.global_batch_size * self._layout.row_bytes

    def get_read_tasks(self, *unused: object, **also_unused: object) -> list[ReadTask]:
        """The first task alone: the feeder adds all further ones."""
        return list(islice(self.tasks(), 1))

    def tasks(self) -> Iterator[ReadTask]:
        """The read tasks in order, each made on demand."""
        header, layout = self._index.header, self._layout
        schema = BlockAccessor.batch_to_block(_empty_rows(layout, 1)).schema
        for chunk in plan_chunks(self._index, layout, start_step=self._start_step, total_steps=self._total_steps):
            rows = chunk.last - chunk.first
            size = rows * layout.row_bytes
            metadata = BlockMetadata(num_rows=rows, size_bytes=size, exec_stats=None, input_files=None)
            yield ReadTask(partial(read_chunk, header, layout, chunk), metadata, schema=schema)


def _configure(context: DataContext, layout: Layout, readers: int) -> None:
    """Configures Ray Data: stable order, unchanged blocks, bounded memory ahead of training."""
    chunks = readers + AHEAD_CHUNKS
    ahead = ExecutionResources.for_limits(object_store_memory=chunks * layout.chunk_rows * layout.row_bytes)
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ahead)
    context.custom_execution_callback_classes = [Feeder]
    crews = count_crews(layout.world_size)
    # A reading task waits while so many of its blocks are not taken, and each look at the task costs more than a block.
    context._max_num_blocks_in_streaming_gen_buffer = max(2, crews)
    block = BlockAccessor.batch_to_block(_empty_rows(layout, layout.group_rows // crews))
    context.target_max_block_size = int(0.8 * BlockAccessor.for_block(block).size_bytes())
    context.enable_progress_bars = context.print_on_execution_start = False


def _empty_rows(layout: Layout, rows: int) -> dict[str, np.ndarray]:
    shape = (rows, layout.resolution, layout.resolution, 3)
    columns: dict[str, np.ndarray] = {
        "image": np.empty(shape, np.uint8),
        "label": np.zeros(rows, np.int64),
        "text": np.zeros((rows, layout.text_length), np.int64),
        "position": np.zeros(rows, np.int64),
    }
    if layout.has_condition:
        columns["condition_image"] = np.empty(shape, np.uint8)
    if layout.degradation is not None:
        columns["task"] = np.zeros(rows, np.int64)
    for name, shape in layout.arrays:
        columns[name] = np.zeros((rows, *shape), np.float16)
    return columns


def _read_rows(header: ShardIndex, layout: Layout, chunk: Chunk, first: int) -> dict[str, np.ndarray]:
    """The rows of a group in the order of positions."""
    last = first + layout.group_rows
    rows = _empty_rows(layout, layout.group_rows)
    rows["position"][:] = np.arange(first, last)
    names = tuple(name for name, _ in layout.arrays)
    cache, view = shard_cache(), View(layout.resolution, layout.member, layout.condition_member, names)
    following = [*(entries for _, entries in chunk.windows[1:]), ()]
    for (window, entries), soon in zip(chunk.windows, following, strict=True):
        if window.start >= last or window.stop <= first:
            continue
        cache.fetch_ahead(header, entries, soon, view=view)
        chosen = pick(window, seed=layout.seed, first=first, last=last)
        offset = max(window.start - first, 0)
        for place, entry in enumerate(entries):
            (where,) = np.nonzero(chosen.places == place)
            if len(where):
                cache.get(header, entry, view=view).fill(rows, where + offset, chosen.ordinals[where])
    if layout.degradation is not None:
        rows |= degrade(rows["image"], rows["position"], layout.degradation)
    return rows
