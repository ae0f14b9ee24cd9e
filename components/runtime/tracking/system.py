"""How busy this machine is, measured by MLflow's own monitors under the names that its page looks for."""

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

PREFIX = "system/"


class SystemMonitor:
    """CPU, memory, disk, network, and GPUs where there are any and their library is installed."""

    def __init__(self) -> None:
        self.monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self.monitors.append(GPUMonitor())
        except (ImportError, MlflowException, RuntimeError):  # no NVML here, so nothing to measure
            return

    def sample(self) -> dict[str, float]:
        """Values now, such as system/cpu_utilization_percentage (since the last call) in percent."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {PREFIX + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values
