"""Speed and memory of a rank between two logs, and use of its machine; names: `runtime.events`."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import psutil
import torch

from components.training.parallel import Worker

logger = logging.getLogger(__name__)
GIGABYTE = 1e9
MEGABYTE = 1_000_000
# Dense bf16 of tensor cores as NVIDIA's data sheets state it, TFLOP/s: words of a device's name -> peak. The first that
# stands in a name counts.
PEAK_TFLOPS: dict[tuple[str, ...], float] = {
    ("B200",): 2250,
    ("GH200",): 989,
    ("H200",): 989,
    ("H100", "NVL"): 835,
    ("H100", "PCIE"): 756,
    ("H100",): 989,
    ("A100",): 312,
    ("L40S",): 362,
    ("L4",): 121,
    ("A10G",): 70,
    ("A10",): 125,
}


def speed_measures(
    worker: Worker,
    *,
    samples: int,
    steps: int,
    seconds: float,
    step_flops: float | None = None,
    utilization: Sequence[float] = (),
) -> dict[str, float]:
    """Samples/s, MFU or GFLOP/s, GPU utilization and peak memory, for `seconds` of training.

    Args:
        samples, steps: of all ranks in these seconds.
        step_flops: of one step of all ranks, forward and backward; None: unknown.
        utilization: shares of the time, each in [0, 1], in which the GPU was busy.
    """
    values = {"samples_per_second": samples / seconds}
    if worker.device.type == "cuda":
        values["samples_per_second_per_gpu"] = samples / seconds / worker.world_size
    if step_flops is not None:
        values |= flops_measures(step_flops * steps / seconds, worker)
    if utilization:
        values["gpu_utilization"] = fmean(utilization)
    return values | {"peak_memory_gb": peak_memory(worker.device) / GIGABYTE}


def counted_flops(count: Callable[[], float] | None, worker: Worker) -> float | None:
    """FLOPs of a step by `count`, in rank 0, the only one to report; None where the count fails.

    Leaves the generators of training alone.
    """
    if count is None or worker.rank > 0:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return count()
    except Exception as error:  # of networks on a device without memory: no reason to end a training
        logger.warning("no FLOPs are counted: %s", error)
        return None


def flops_measures(flops_per_second: float, worker: Worker) -> dict[str, float]:
    """MFU on GPUs with a known peak, GFLOP/s elsewhere.

    MFU by PaLM (Chowdhery et al., 2022, appendix B): FLOPs that the model needs, without recomputed activations, over
    the peak of the devices in all of the time, waits and checkpoints included.
    """
    peak = peak_flops(torch.cuda.get_device_name(worker.device)) if worker.device.type == "cuda" else None
    if peak is None:
        return {"achieved_gflops": flops_per_second / 1e9}
    return {"mfu": flops_per_second / (peak * worker.world_size)}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device in bf16, by name; None for an unknown device, or a part of one (MIG)."""
    words = device_name.upper().replace("-", " ").split()
    peaks = (peak for named, peak in PEAK_TFLOPS.items() if all(word in words for word in named))
    peak = None if "MIG" in words else next(peaks, None)
    return None if peak is None else peak * 1e12


def peak_memory(device: torch.device) -> float:
    """Peak bytes of tensors on the GPU; without a GPU, peak memory of the process.

    Where the system keeps no such mark (only Linux does), the process's memory at present.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    mark = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return float(1024 * int(mark[1]) if mark else psutil.Process().memory_info().rss)


def forget_peak_memory(device: torch.device) -> None:
    """Reset the GPU's peak; a process's peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_utilization(device: torch.device) -> list[float]:
    """The share of the last 1/6 to 1 s in which a kernel ran on the GPU, by NVML; [] if unknown."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.utilization(device) / 100]
    except Exception:  # no driver, no NVML, no right to ask, or a part of a GPU: never a reason to end a training
        return []


def system_metrics() -> dict[str, float]:
    """CPU since the call before, memory and, if any, GPU of the node, under MLflow's own names."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        values["system/gpu_0_memory_usage_megabytes"] = (total - free) / MEGABYTE
        values["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
    return values
