"""What it costs to hand blocks to many ranks: 16 processes read the stream, ten steps each second, and throw it away.
They say how long they waited. CPU time is told too, of the process that hands blocks to crews and the busiest dealer;
it has no limit, for it holds how often they look for work: some 3 ms each time, block or none, every few milliseconds.
64 and 512 ranks are simulated with what a block costs (`crews.py`), not with what was measured here.

Images are small and few, so that reading costs little: blocks cost the same whatever is in them.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import ray

from components.data.crews import BLOCK_SECONDS, HAND_SECONDS, STEP_SECONDS, count_crews, fewest_steps, split_stream
from components.data.shards import ShardIndex
from components.data.stream import rank_batches, training_stream
from components.runtime.storage.store import Store
from pipelines.engine.session import start_ray
from tests.benchmarks.bench_planning import row
from tests.dealing import Dealing
from tests.image_sets import write_set

RANKS, SHARE = 16, 32
WARM_UP, STEPS = 30, 150
PAUSE = 0.1  # seconds, in the place of a training step
SIMULATED = (64, 512)


def rows(rounds: int) -> list[dict[str, object]]:
    """Seconds a step; `peer` is what rows must stay below."""
    start_ray(worker_start_timeout=120, verbose=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            index = write_set(Store(str(Path(folder))), sizes=(100,) * 4)
            runs = [run(index) for _ in range(rounds)]
    finally:
        ray.shutdown()
    middle = {name: median(run[name] for run in runs) for name in runs[0]}
    limit = {"unit": f"s a step, limit {STEP_SECONDS}", "peer": STEP_SECONDS}
    return [
        row("ranks_16_coordinator", middle["coordinator"], "s of CPU a step"),
        row("ranks_16_dealer", middle["dealer"], "s of CPU a step"),
        row("ranks_16_wait", middle["wait"], **limit),
        *(row(f"ranks_{n}_simulated", simulated(n), **limit) for n in SIMULATED),
    ]


def simulated(world_size: int) -> float:
    """Of ranks that do nothing but take batches: what dealing costs a step."""
    how = Dealing(world_size, count_crews(world_size), fewest_steps(world_size), BLOCK_SECONDS, HAND_SECONDS)
    return how.seconds_a_step(0.0)


def run(index: ShardIndex) -> dict[str, float]:
    """Seconds a step: of waiting, in the rank that waits most; of CPU time, in coordinator and busiest dealer."""
    stream = training_stream(
        index,
        resolution=8,
        global_batch_size=RANKS * SHARE,
        world_size=RANKS,
        seed=0,
        start_step=0,
        total_steps=WARM_UP + STEPS,
    )
    older = {*actors("CrewDealer"), *actors("SplitCoordinator")}  # of the round before, which end in their own time
    parts = split_stream(stream, world_size=RANKS)
    dealers = wait_for("CrewDealer", count_crews(RANKS), older=older)
    pids = [*wait_for("SplitCoordinator", 1, older=older), *dealers]
    found = ray.get([read.remote(part, pids) for part in parts])
    waits, ((before, after), *_) = zip(*found, strict=True)
    coordinator, *dealt = ((last - first) / STEPS for first, last in zip(before, after, strict=True))
    return {"wait": max(waits) / STEPS, "coordinator": coordinator, "dealer": max(dealt)}


@ray.remote(num_cpus=0)
def read(part: ray.data.DataIterator, pids: list[int]) -> tuple[float, list[list[float]]]:
    """One rank: seconds it waited for batches after WARM_UP steps; CPU seconds of `pids` then and at the end."""
    batches = rank_batches(part, batch_size=SHARE, steps=WARM_UP + STEPS)
    marks, waited = [], 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            marks.append(cpu_seconds(pids))
        start = time.perf_counter()
        assert len(next(batches)["position"]) == SHARE
        waited += time.perf_counter() - start if step >= WARM_UP else 0
        time.sleep(PAUSE)
    return waited, [*marks, cpu_seconds(pids)]


def cpu_seconds(pids: list[int]) -> list[float]:
    return [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]


def wait_for(actor: str, count: int, *, older: set[int]) -> list[int]:
    """Process ids of the new actors of that class on this Ray, once there are `count`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [pid for pid in actors(actor) if pid not in older]
        if len(found) == count:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"no {count} processes of {actor} within two minutes")


def actors(name: str) -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if is_actor(child, name)]


def is_actor(process: psutil.Process, actor: str) -> bool:
    try:
        return process.cmdline()[0].startswith(f"ray::{actor}")  # and, now and then, the method that it was last in
    except (psutil.NoSuchProcess, IndexError):
        return False


if __name__ == "__main__":
    for row_ in rows(1):
        print(row_)
