"""Traces of a few steps by torch.profiler: all operations on the CPU and on the GPU, with times.
A trace opens in Perfetto and chrome://tracing. Recording slows these steps and changes no number. The first of them
also pays for the profiler's own start."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from components.runtime import events
from components.runtime.execution import Profiling
from components.runtime.storage.store import SCRATCH, Store, StoreError
from components.training.loop import Batch
from components.training.parallel import Worker

logger = logging.getLogger(__name__)


@contextmanager
def traced(
    batches: Iterator[Batch],
    profiling: Profiling | None,
    *,
    stage: str,
    worker: Worker,
    recorder: events.Recorder,
    start_step: int,
) -> Iterator[Iterator[Batch]]:
    """The same batches; rank 0 records the steps of `profiling` between them.
    A step lasts from the request of its batch to the request of the next, so its log, checkpoint and images are part of
    it. At the end of training, of whatever kind, the recorded steps are stored. No failure here ends a training."""
    if profiling is None or worker.rank > 0:
        yield batches
        return
    trace = Trace(profiling, stage, worker, recorder)
    try:
        yield trace.follow(batches, start_step=start_step)
    finally:
        trace.end()


class Trace:
    """Records steps of a training, and stores the trace in the folder of traces."""

    def __init__(self, profiling: Profiling, stage: str, worker: Worker, recorder: events.Recorder) -> None:
        self.profiling, self.stage, self.worker, self.recorder = profiling, stage, worker, recorder
        self.steps: list[int] = []  # recorded so far
        self.profiler: profile | None = None  # while it records
        self.step = ExitStack()
        self.failed = False

    def follow(self, batches: Iterator[Batch], *, start_step: int) -> Iterator[Batch]:
        """The same batches; before each ends the step before, and begins one that is to be recorded."""
        for step in count(start_step + 1):
            self.step.close()
            if not self.profiling.first_step <= step <= self.profiling.last_step:
                self.end()
            elif not self.failed:
                with self.harmless():
                    self.begin(step)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def begin(self, step: int) -> None:
        """Record a step, of the GPU too where the rank has one."""
        if self.profiler is None:
            on_gpu = [ProfilerActivity.CUDA] if self.worker.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
            self.profiler.start()
        self.step.enter_context(record_function(f"step {step}"))
        self.steps.append(step)

    def end(self) -> None:
        """Stop the profiler, upload the trace, if any, and report its URL."""
        self.step.close()
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        with self.harmless(), tempfile.TemporaryDirectory(prefix=f"{SCRATCH}trace-") as scratch:
            profiler.stop()
            folder = Store(self.profiling.folder)
            name = f"{self.stage}-steps-{self.steps[0]}-{self.steps[-1]}.json.gz"
            profiler.export_chrome_trace(str(Path(scratch) / name))
            folder.upload(Path(scratch) / name, name)
            self.recorder.emit(events.Text(self.stage, "trace.txt", folder.url(name)))

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """After a failure inside nothing more is recorded, with a warning."""
        try:
            yield
        except (RuntimeError, OSError, StoreError) as error:
            self.profiler, self.failed = None, True
            logger.warning("%s: no trace", self.stage, exc_info=error)
            self.recorder.emit(events.Warning(self.stage, f"no trace: {str(error).partition(chr(10))[0]}"))
