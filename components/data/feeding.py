"""What Ray Data's scheduling loop lacks for a stream without end: read tasks made as they are needed, and rests.

Ray 2.60 makes all read tasks of a dataset before the first one runs: a million steps would be hundreds of thousands of
objects in its store. Here it is given the first, and each further one when those before it have been taken.
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from components.runtime.ray_internals import BlockEntry, ExecutionCallback, InputDataBuffer, RefBundle

SHORTEST_REST = 0.005  # seconds; while a rank waits for a block
LONGEST_REST = 0.2  # once none has waited for a while: a block holds several steps
KEPT = 256  # read tasks that Ray could still be asked to run again, for blocks that were lost before they were taken


class LazySource(Datasource):
    """A data source whose read tasks are an iterator; to be used with the callback `Feeder`."""

    ahead: int  # read tasks that wait to be run

    def tasks(self) -> Iterator[ReadTask]:
        """The read tasks in order, made when they are asked for."""
        raise NotImplementedError

    def get_read_tasks(self, *unused: object, **also_unused: object) -> list[ReadTask]:
        """The first alone: the rest is the feeder's."""
        return list(islice(self.tasks(), 1))


class Feeder(ExecutionCallback):
    """Gives the read operator of a LazySource its tasks one by one, and rests between the steps of the loop.

    The loop waits for tasks and not for consumers: it would spin for as long as training is slower than reading (ray
    2.60, streaming_executor.py). So rests grow while nobody waits, and a rank that waits makes them short again. Its
    input operator counts as finished from the start, which is put off here.
    """

    def before_execution_starts(self, executor: Any) -> None:  # Ray's StreamingExecutor
        topology = executor._topology or {}
        self.input = next(op for op in topology if isinstance(op, InputDataBuffer))
        source = self.input._logical_operators[0].datasource
        assert isinstance(source, LazySource)
        self.ahead, self.tasks, self.rest = source.ahead, islice(source.tasks(), 1, None), SHORTEST_REST
        self.input._is_execution_marked_finished = self.input._inputs_complete = False
        topology[self.input].inputs_done_called = True

    def on_execution_step(self, executor: Any) -> None:
        while not self.input.has_execution_finished() and self.waiting() < self.ahead:
            self.feed()
        self.rest = SHORTEST_REST if executor._consumer_idling() else min(2 * self.rest, LONGEST_REST)
        time.sleep(self.rest)

    def waiting(self) -> int:
        """Tasks that were handed over and not run."""
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
        kept = KEPT + self.ahead  # those that wait to be run are not to be forgotten, however many readers there are
        if len(tasks) > kept:
            tasks[-kept - 1] = None
