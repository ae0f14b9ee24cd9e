"""What a rank makes of its machine between two logs; `components.runtime.measures` says what the figures are called."""

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
    """What `steps` steps of `samples` samples together, of all ranks, in so many seconds come to.

    Args:
        step_flops: of one step of all ranks, forward and backward; None: not known.
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
    """What `count` says of one step, asked in rank 0, which alone reports; None where it can't be told.

    Nothing that training draws is drawn meanwhile.
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
    """MFU on GPUs whose peak is known, GFLOP/s elsewhere.

    MFU as PaLM (Chowdhery et al., 2022, appendix B) has it: FLOPs that the model needs, none that are spent on
    computing activations again, over what the devices could have done in all of the time, waits and checkpoints too.
    """
    peak = peak_flops(torch.cuda.get_device_name(worker.device)) if worker.device.type == "cuda" else None
    if peak is None:
        return {"achieved_gflops": flops_per_second / 1e9}
    return {"mfu": flops_per_second / (peak * worker.world_size)}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s in bf16 of the device with this name; None for one that is not known, or a part of one (MIG)."""
    words = device_name.upper().replace("-", " ").split()
    known = (peak for named, peak in PEAK_TFLOPS.items() if all(word in words for word in named))
    peak = None if "MIG" in words else next(known, None)
    return None if peak is None else peak * 1e12


def peak_memory(device: torch.device) -> float:
    """Most bytes of tensors that were on the GPU at once; without one, most that this process had in memory.

    Where the system keeps no such mark (it is Linux's), what the process has now.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    mark = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return float(1024 * int(mark[1]) if mark else psutil.Process().memory_info().rss)


def forget_peak_memory(device: torch.device) -> None:
    """Begin again to look for the GPU's peak; that of a process stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_utilization(device: torch.device) -> list[float]:
    """[share of the last moment, 1/6 to 1 s, in which a kernel ran on this GPU], by NVML; [] where nobody knows it."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.utilization(device) / 100]
    except Exception:  # no driver, no NVML, no right to ask, or a part of a GPU: never a reason to end a training
        return []
