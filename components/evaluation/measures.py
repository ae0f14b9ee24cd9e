"""A training's measures of its use of the machine: names, titles and units.

Workers log them under these names (`components.training.reporting`), every few steps, each time of the steps since the
log before. The figure of a whole run is the median of its logs where it is a rate or a share, the largest where it is a
peak, the sum where it is a time. What a device lacks is left out: there is no MFU of a processor without a known peak,
and no share of a GPU's time where there is none.

The live table, the report and Prometheus's gauges have the same titles; MLflow has the names.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Measure(NamedTuple):
    """A figure of a training for table, MLflow and report; a device that lacks it leaves it out."""

    title: str
    text: Callable[[float], str]  # with its unit
    of_run: Callable[[Sequence[float]], float]  # the figures of all logs -> that of the run


def plain(value: float) -> str:
    """Formats with about three significant digits: `0.42`, `8.1`, `812`, `24,700`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """0.42 -> `42 %`."""
    return f"{100 * share:.0f} %"


# By the name under which a training logs them.
MEASURES = {
    "samples_per_second": Measure("samples/s", plain, median),  # of all devices
    "samples_per_second_per_gpu": Measure("per GPU", plain, median),
    "mfu": Measure("MFU", percent, median),  # FLOP/s of the recipe over the GPUs' peak in bf16
    "achieved_gflops": Measure("GFLOP/s", plain, median),  # of all devices, where no peak is known
    "gpu_utilization": Measure("GPU busy", percent, median),  # time in which any kernel ran
    "data_wait_fraction": Measure("data wait", percent, median),  # time of waiting for data
    "peak_memory_gb": Measure("peak memory", "{:.1f} GB".format, max),  # of GPU or process
    "checkpoint_hold_seconds": Measure("checkpoints", "{:,.1f} s".format, sum),  # held since the last log
}


def measures_of(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Measures of a whole run from logged values; measures without a log are left out."""
    series = {name: [values[name] for values in points if name in values] for name in MEASURES}
    return {name: MEASURES[name].of_run(values) for name, values in series.items() if values}
