"""Steps of several sides, one of each in turn, so that all see the same machine."""

import time
from collections.abc import Callable
from statistics import median

Step = Callable[[], object]


def on_this_thread() -> None:
    """Nothing to wait for: a step is done when it returns."""


def timed(step: Step, wait: Step = on_this_thread) -> tuple[float, float]:
    """Wall-clock and processor seconds of one step."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(
    steps: dict[str, Step], *, rounds: int, warm_up: int = 2, wait: Step = on_this_thread
) -> dict[str, tuple[float, float]]:
    """Median wall-clock and processor seconds of each.

    Args:
        warm_up: steps of each that do not count.
        wait: returns when all is done that steps have asked for.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, wait))
    return {name: (median(wall for wall, _ in t), median(cpu for _, cpu in t)) for name, t in times.items()}
