"""Sixteen ranks read the stream, ten steps each second, and throw it away: how long they wait, and the CPU time of a
rank's own process, where Ray Data's loop runs beside training, and of its reader.

Images are small and few, so that reading costs little: blocks cost the same whatever is in them.
"""

import tempfile
import time
from contextlib import suppress
from statistics import median

import psutil
import ray

from components.data.decoded import ImageSamples
from components.data.shards import View
from components.data.stream import rank_batches
from components.runtime.storage.store import Store
from tests.benchmarks.interleaving import Row, own_ray, row
from tests.image_sets import write_set
from tests.nodes import title_of

RANKS, SHARE = 16, 32
WARM_UP, STEPS = 30, 150
PAUSE = 0.1  # seconds, in the place of a training step
LIMIT = 0.01  # seconds


def rows(rounds: int) -> list[Row]:
    """Seconds a step; `peer` is what rows must stay below."""
    with own_ray(), tempfile.TemporaryDirectory() as folder:
        samples = ImageSamples(write_set(Store(folder), sizes=(100,) * 48), View(8))
        runs = [run(samples) for _ in range(rounds)]
    waits, busy, readers = (median(column) for column in zip(*runs, strict=True))
    return [
        row("ranks_16_wait", waits, LIMIT, f"s a step, limit {LIMIT}"),
        row("ranks_16_process", busy, unit="s of CPU a step in the process of a rank"),
        row("ranks_16_reader", readers, unit="s of CPU a step in its reader"),
    ]


def run(samples: ImageSamples) -> tuple[float, float, float]:
    """Seconds a step: of waiting, in the rank that waits most; of CPU time, of a mean rank and of a mean reader."""
    told = ray.get([read.remote(samples, rank) for rank in range(RANKS)])
    waits, busy, readers = zip(*told, strict=True)
    return max(waits) / STEPS, sum(busy) / RANKS / STEPS, max(readers) / RANKS / STEPS


@ray.remote(num_cpus=0)
def read(samples: ImageSamples, rank: int) -> tuple[float, float, float]:
    """One rank after WARM_UP steps: seconds it waited for batches; CPU seconds of its process, and of all readers."""
    how = {"global_batch_size": RANKS * SHARE, "seed": 0, "streams": 48, "total_steps": WARM_UP + STEPS}
    batches, waited = rank_batches(samples, rank=rank, world_size=RANKS, **how), 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            own, readers = time.process_time(), reader_seconds()
        begun = time.perf_counter()
        assert len(next(batches)["position"]) == SHARE
        waited += time.perf_counter() - begun if step >= WARM_UP else 0
        time.sleep(PAUSE)
    return waited, time.process_time() - own, reader_seconds() - readers


def reader_seconds() -> float:
    """CPU seconds of all readers of this machine's Ray."""
    seconds = 0.0
    for process in psutil.Process().parent().children(recursive=True):
        with suppress(psutil.Error):  # one of the round before has just ended
            seconds += sum(process.cpu_times()[:2]) if "Reader" in title_of(process) else 0
    return seconds
