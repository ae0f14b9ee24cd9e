"""Read tasks on demand, and rests, for Ray Data's scheduling loop over an endless stream.

Ray 2.60 makes all read tasks of a dataset before the first one runs: a million steps would be hundreds of thousands of
objects in its store. Here Ray gets the first, and each further task when the earlier ones have been taken.
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
LONGEST_REST = 0.2  # seconds; once no rank has waited for a while: a block holds several steps
KEPT = 256  # read tasks that Ray may have to run again, for blocks that were lost before they were taken


class LazySource(Datasource):
    """A data source with an iterator of read tasks; to be used with the callback `Feeder`."""

    ahead: int  # read tasks that wait to be run

    def tasks(self) -> Iterator[ReadTask]:
        """The read tasks in order, each made on demand."""
        raise NotImplementedError

    def get_read_tasks(self, *unused: object, **also_unused: object) -> list[ReadTask]:
        """The first task alone: the feeder adds all further ones."""
        return list(islice(self.tasks(), 1))


class Feeder(ExecutionCallback):
    """Feeds the read operator of a LazySource task by task, and rests between the steps of the loop.

    The loop waits for tasks and not for consumers: it would spin for as long as training is slower than reading (ray
    2.60, streaming_executor.py). So rests grow while no rank waits, and a waiting rank makes them short again. Ray's
    input operator counts as finished from the start; here it finishes after the last task.
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
