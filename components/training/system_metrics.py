"""Use of the machine, under the names that MLflow gives its own system metrics."""

import psutil
import torch

MEGABYTE = 1_000_000


def system_metrics() -> dict[str, float]:
    """CPU, memory and, where there is one, GPU of this node; CPU since the call before."""
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
