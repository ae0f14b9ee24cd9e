"""Measures of a training's use of the machine: name, title and unit for table, MLflow and report.

A training logs them (`components.training.speed`); a device that lacks a measure leaves that one out.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Measure(NamedTuple):
    """A figure of a training."""

    title: str
    text: Callable[[float], str]
    of_run: Callable[[Sequence[float]], float]  # the figures of all logs -> that of the run


def plain(value: float) -> str:
    """Formats with about three significant digits: `0.42`, `8.1`, `812`, `24,700`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def gigabytes(value: float) -> str:
    return f"{value:.1f} GB"


def seconds(value: float) -> str:
    return f"{value:,.1f} s"


MEASURES = {
    "samples_per_second": Measure("samples/s", plain, median),  # of all devices
    "samples_per_second_per_gpu": Measure("per GPU", plain, median),
    "mfu": Measure("MFU", percent, median),  # model FLOPs utilization: FLOP/s of the recipe over the GPUs' peak in bf16
    "achieved_gflops": Measure("GFLOP/s", plain, median),  # the same FLOP/s, of all devices; where no peak is known
    "gpu_utilization": Measure("GPU busy", percent, median),  # share of the time in which any kernel ran
    "data_wait_fraction": Measure("data wait", percent, median),  # share of the time that training waited for data
    "peak_memory_gb": Measure("peak memory", gigabytes, max),  # of the GPU's tensors; without one, of the process
    "checkpoint_hold_seconds": Measure("checkpoints", seconds, sum),  # that they held training since the log before
}


def measures_of(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Measures of a whole run from logged values; measures without a log are left out."""
    series = {name: [values[name] for values in points if name in values] for name in MEASURES}
    return {name: MEASURES[name].of_run(values) for name, values in series.items() if values}
