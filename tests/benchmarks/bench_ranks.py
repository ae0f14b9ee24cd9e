"""What it costs to hand blocks to many ranks: 16 processes read the stream, ten steps each second, and throw it away.
They say how long they waited. CPU time is told too, of the process that hands blocks to crews and the busiest dealer;
it has no limit, for it holds how often they look for work: some 3 ms each time, block or none, every few milliseconds.
64 and 512 ranks are simulated with what a block costs (`crews.py`), not with what was measured here.

Images are small and few, so that reading costs little: blocks cost the same whatever is in them.
"""

import tempfile
import time
from statistics import median

import psutil
import ray

from components.data.crews import BLOCK_SECONDS, HAND_SECONDS, STEP_SECONDS, count_crews, fewest_steps, split_stream
from components.data.shards import ShardIndex, View
from components.data.stream import rank_batches, training_stream
from components.runtime.storage.store import Store
from tests.benchmarks.interleaving import Row, own_ray, row
from tests.dealing import Dealing
from tests.image_sets import write_set
from tests.nodes import title_of
from tests.waiting import eventually

RANKS, SHARE = 16, 32
WARM_UP, STEPS = 30, 150
PAUSE = 0.1  # seconds, in the place of a training step
SIMULATED = (64, 512)


def rows(rounds: int) -> list[Row]:
    """Seconds a step; `peer` is what rows must stay below."""
    with own_ray(), tempfile.TemporaryDirectory() as folder:
        index = write_set(Store(folder), sizes=(100,) * 4)
        runs = [run(index) for _ in range(rounds)]
    middle = {name: median(run[name] for run in runs) for name in runs[0]}
    limit = {"unit": f"s a step, limit {STEP_SECONDS}", "peer": STEP_SECONDS}
    return [
        row("ranks_16_coordinator", middle["coordinator"], unit="s of CPU a step"),
        row("ranks_16_dealer", middle["dealer"], unit="s of CPU a step"),
        row("ranks_16_wait", middle["wait"], **limit),
        *(row(f"ranks_{n}_simulated", simulated(n), **limit) for n in SIMULATED),
    ]


def simulated(world_size: int) -> float:
    """Of ranks that do nothing but take batches: what dealing costs a step."""
    how = Dealing(world_size, count_crews(world_size), fewest_steps(world_size), BLOCK_SECONDS, HAND_SECONDS)
    return how.seconds_a_step(0.0)


def run(index: ShardIndex) -> dict[str, float]:
    """Seconds a step: of waiting, in the rank that waits most; of CPU time, in coordinator and busiest dealer."""
    steps = {"start_step": 0, "total_steps": WARM_UP + STEPS}
    stream = training_stream(index, View(8), global_batch_size=RANKS * SHARE, world_size=RANKS, seed=0, **steps)
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
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in actors(actor) if pid not in older]
        return len(found) == count

    assert eventually(there, 120, pause=0.2), f"no {count} processes of {actor} within two minutes"
    return found


def actors(name: str) -> list[int]:
    """Process ids; a title goes on, now and then, with the method that the actor was last in."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if title_of(child).startswith(f"ray::{name}")]
