"""Steps of several sides, one of each in turn, so that all see the same machine, and the rows that they become."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import ray
import torch

from pipelines.engine.session import start_ray

Step = Callable[[], object]
Row = dict[str, Any]
Times = dict[str, tuple[float, float]]  # median wall-clock and processor seconds


def on_this_thread() -> None:
    """Nothing to wait for: a step is done when it returns."""


def timed(step: Step, wait: Step = on_this_thread) -> tuple[float, float]:
    """Wall-clock and processor seconds of one step."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(steps: dict[str, Step], *, rounds: int, warm_up: int = 2, wait: Step = on_this_thread) -> Times:
    """Times of each after `warm_up` steps that do not count; `wait` returns when all that steps asked for is done."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, wait))
    return {name: (median(wall for wall, _ in t), median(cpu for _, cpu in t)) for name, t in times.items()}


def row(name: str, ours: float, peer: float | None = None, unit: str = "s", **more: object) -> Row:
    """A row of the table; `peer` may also be what ours must stay below."""
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer if peer else None, "unit": unit, **more}


def raced(name: str, times: Times, *, peer: str = "peer") -> Row:
    """Ours against a peer, each at the fastest of its forms, whose names begin with the side's."""
    (ours, cpu), (theirs, peer_cpu) = (min(times[f] for f in times if f.startswith(side)) for side in ("ours", peer))
    return row(name, ours, theirs, cpu_ours=cpu, cpu_peer=peer_cpu)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_ray() -> Iterator[None]:
    start_ray(worker_start_timeout=120, verbose=False)
    try:
        yield
    finally:
        ray.shutdown()


def cpu_of_tree(root: psutil.Process | None = None) -> float:
    """CPU seconds of a process, this one if none is given, and of all that it started."""
    total, root = 0.0, root or psutil.Process()
    for process in [root, *root.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total
