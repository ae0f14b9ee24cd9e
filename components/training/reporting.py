"""Reports of a training worker: progress each second, metrics and speed every log_every steps, images.

Training is saved by steps or by the clock of rank 0; votes of the clock travel with the metrics. Names of figures:
`evaluation.measures`. Traces of a few steps are by torch.profiler: all operations on CPU and GPU, with times. A
trace opens in Perfetto and chrome://tracing. Recording slows these steps and changes no number; the first of them also
pays for the profiler's own start."""

import logging
import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from components.configuration.optimization import OptimizationConfig
from components.models.devices import ToldLater
from components.runtime import events
from components.runtime.execution import Profiling
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, StoreError
from components.training.loop import Batch, Metrics, is_scheduled
from components.training.optim import LossWatch, learning_rate
from components.training.parallel import Worker, average

logger = logging.getLogger(__name__)
PROGRESS_INTERVAL = 1.0  # seconds
VOTE_SECONDS = 5.0  # a notice may come 30 s before a node goes
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


class CheckpointClock:
    """Decides when to save and when to leave: the same step on all ranks.
    Training is saved by the recipe's steps or, with `checkpoint_minutes`, by the clock of rank 0; it leaves when the
    node of a rank `is_taken_away`. Votes go with the metrics that ranks average at every `log_every` steps, and alone
    where as many steps take more than VOTE_SECONDS. Snapshots of a power EMA come by steps all the same."""

    def __init__(
        self, config: OptimizationConfig, worker: Worker, start_step: int, is_taken_away: Callable[[], bool]
    ) -> None:
        self.config, self.worker, self.is_taken_away = config, worker, is_taken_away
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.leaving = False
        # Of the last votes; the first step, which may compile the network, says nothing of the seconds of a step.
        self.voted_step, self.voted_at, self.next_votes = start_step, time.monotonic(), start_step + 2
        self.restart()

    def restart(self) -> None:
        """Count from now: training has begun, or was saved."""
        self.began, self.agreed = time.monotonic(), False

    def vote(self, step: int) -> None:
        """Called after every step: asks all ranks where the next metrics are too far away."""
        if self.worker.world_size == 1:
            self.leaving = self.is_taken_away()
        elif step >= self.next_votes:
            self.averaged(step, {})

    def averaged(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Means of metrics over all ranks, as numbers; votes travel along. Only here training waits."""
        now = time.monotonic()
        passed = self.seconds is not None and self.worker.rank == 0 and now - self.began >= self.seconds
        votes = [float(passed), float(self.is_taken_away()), (now - self.voted_at) / max(1, step - self.voted_step)]
        columns = [torch.full((), vote, device=self.worker.device) for vote in votes]
        columns += [value.detach().float() for value in metrics.values()]
        due, leaving, seconds, *values = average(torch.stack(columns), self.worker).tolist()
        self.agreed, self.leaving = due > 0, leaving > 0
        self.voted_step, self.voted_at = step, now
        self.next_votes = step + max(1, int(VOTE_SECONDS / max(seconds, 1e-9)))  # the same mean on all ranks
        return dict(zip(metrics, values, strict=True))

    def is_due(self, step: int) -> bool:
        """True if training is saved after `step`; the same on all ranks."""
        if self.seconds is None or self.config.ema == "power":
            return self.agreed or is_scheduled(step, self.config)
        return self.agreed or step == self.config.total_steps


class Elapsed(NamedTuple):
    """Seconds of training in all tries."""

    wall: float = 0.0  # by the clock
    cpu: float = 0.0  # of rank 0's process, all its threads


NOTHING = Elapsed()


class Reporter:
    """Rank 0 reports; the other ranks take part where numbers are averaged."""

    def __init__(
        self,
        config: OptimizationConfig,
        *,
        stage: str,
        worker: Worker,
        recorder: events.Recorder,
        start_step: int,
        before: Elapsed = NOTHING,
        step_flops: float | None = None,
        is_taken_away: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.stage, self.worker, self.recorder = config, stage, worker, recorder
        self.start_step, self.before = start_step, before
        self.step_flops = step_flops  # FLOPs of a step of all ranks, forward and backward; None: unknown
        self.started = self.logged_at = self.progress_at = time.monotonic()
        self.cpu_started = time.process_time()
        self.logged_step = self.progress_step = start_step
        self.coming: ToldLater | None = None  # a loss in transfer from the device
        self.loss = math.nan  # the last one that arrived
        self.clock = CheckpointClock(config, worker, start_step, is_taken_away)
        self.watch = LossWatch(config)
        # Seconds since the last log: spent waiting for data; held by checkpoints; of these, to copy states to the host.
        self.waited = self.held_seconds = self.copy_seconds = 0.0
        self.held_before = 0.0  # seconds that checkpoints held training before the last log
        self.utilization: list[float] = []  # of the GPU since the last log

    def is_due(self, step: int) -> bool:
        """True if training is saved after `step`, by the clock; none is saved by steps while the loss is high."""
        held = self.watch.high > 0 and self.config.ema != "power" and step < self.config.total_steps
        return self.clock.is_due(step) and not held

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time that training waits for each."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def log(self, step: int, metrics: Metrics) -> None:
        """Called at every step by every rank."""
        last = step == self.config.total_steps
        if step % self.config.log_every == 0 or last:
            values = self.clock.averaged(step, metrics)
            self.watch.add(values, step=step)
            if self.worker.rank == 0:
                values |= self.speed(step) | system_metrics()
                self.recorder.emit(events.Metrics(self.stage, step, values))
        self.clock.vote(step)
        now = time.monotonic()
        if self.worker.rank == 0 and (last or now - self.progress_at >= PROGRESS_INTERVAL):
            loss = self.latest(metrics["loss"])
            rate = (step - self.progress_step) / max(now - self.progress_at, 1e-9)
            self.recorder.emit(events.Progress(self.stage, step, self.config.total_steps, rate=rate, loss=loss))
            self.progress_at, self.progress_step = now, step
            self.utilization += gpu_utilization(self.worker.device)

    def latest(self, loss: Tensor) -> float:
        """The loss of the step on a CPU; elsewhere the last loss that arrived, without a wait for the device."""
        if loss.device.type == "cpu":
            return float(loss)
        if self.coming is not None and self.coming.has_arrived:
            self.loss = float(self.coming.read())
        if self.coming is None or self.coming.has_arrived:
            self.coming = ToldLater(loss)
        return self.loss

    def speed(self, step: int) -> dict[str, float]:
        """Learning rate, samples/s, waits, and holds by checkpoints since the last log; resets the counts."""
        now = time.monotonic()
        seconds, steps, size = max(now - self.logged_at, 1e-9), step - self.logged_step, self.config.global_batch_size
        taken = {"samples": steps * size, "steps": steps, "seconds": seconds}
        values = {
            "learning_rate": learning_rate(self.config, step),
            "samples_seen": float(step * size),
            **speed_measures(self.worker, **taken, step_flops=self.step_flops, utilization=self.utilization),
            "data_wait_fraction": self.waited / seconds,
        }
        if self.held_seconds:
            values |= {"checkpoint_hold_seconds": self.held_seconds, "checkpoint_copy_seconds": self.copy_seconds}
        self.logged_at, self.logged_step, self.waited, self.utilization = now, step, 0.0, []
        self.held_before += self.held_seconds
        self.held_seconds = self.copy_seconds = 0.0
        return values

    def elapsed(self) -> Elapsed:
        """Seconds of training so far, those of earlier tries with them."""
        wall, cpu = time.monotonic() - self.started, time.process_time() - self.cpu_started
        return Elapsed(round(self.before.wall + wall, 2), round(self.before.cpu + cpu, 2))

    def summary(self, step: int) -> dict[str, float]:
        """Steps, seconds in all tries, samples/s, and seconds that checkpoints held training in this try.
        Samples/s are of this try, or of all tries if it took no step."""
        elapsed, steps = self.elapsed(), step - self.start_step
        seconds = elapsed.wall - self.before.wall if steps else self.before.wall
        rate = (steps or step) * self.config.global_batch_size / max(seconds, 1e-9)
        return {
            "steps": float(step),
            "train_seconds": elapsed.wall,
            "cpu_seconds": elapsed.cpu,
            "samples_per_second": round(rate, 2),
            "checkpoint_hold_seconds": round(self.held_before + self.held_seconds, 2),
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
    """Samples/s, MFU or GFLOP/s, GPU utilization and peak memory, for `seconds` of training of all ranks.
    `step_flops` is of a whole step; None: unknown. `utilization` holds shares in [0, 1] of the time."""
    values = {"samples_per_second": samples / seconds}
    if worker.device.type == "cuda":
        values["samples_per_second_per_gpu"] = samples / seconds / worker.world_size
    if step_flops is not None:
        values |= flops_measures(step_flops * steps / seconds, worker)
    if utilization:
        values["gpu_utilization"] = fmean(utilization)
    return values | {"peak_memory_gb": peak_memory(worker.device) / GIGABYTE}


def counted_flops(count: Callable[[], float] | None, worker: Worker) -> float | None:
    """FLOPs of a step by `count`, in rank 0, the only one to report; None where the count fails."""
    if count is None or worker.rank > 0:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return count()
    except Exception as error:  # of networks on a device without memory: no reason to end a training
        logger.warning("no FLOPs are counted: %s", error)
        return None


def flops_measures(flops_per_second: float, worker: Worker) -> dict[str, float]:
    """MFU by PaLM (Chowdhery et al., 2022, appendix B) on GPUs with a known peak, GFLOP/s elsewhere.
    FLOPs without recomputed activations over the peak in all of the time, waits and checkpoints included."""
    peak = peak_flops(torch.cuda.get_device_name(worker.device)) if worker.device.type == "cuda" else None
    if peak is None:
        return {"achieved_gflops": flops_per_second / 1e9}
    return {"mfu": flops_per_second / (peak * worker.world_size)}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device in bf16, by name; None for an unknown device, or a part of one (MIG)."""
    words = device_name.upper().replace("-", " ").split()
    peaks = (peak for named, peak in PEAK_TFLOPS.items() if all(word in words for word in named))
    return None if "MIG" in words or (peak := next(peaks, None)) is None else peak * 1e12


def peak_memory(device: torch.device) -> float:
    """Peak bytes of tensors on the GPU; without one, of the process (present ones without such a mark)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    mark = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return float(1024 * int(mark[1]) if mark else psutil.Process().memory_info().rss)


def gpu_utilization(device: torch.device) -> list[float]:
    """The share of the last 1/6 to 1 s in which a kernel ran on the GPU, by NVML; [] if unknown."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.utilization(device) / 100]
    except Exception:  # no driver, no NVML, no right to ask: no reason to end a training
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


@contextmanager
def traced(
    batches: Iterator[Batch],
    profiling: Profiling | None,
    *,
    stage: str,
    worker: Worker,
    recorder: events.Recorder,
    start_step: int,
) -> Iterator[Iterator[Batch]]:
    """The same batches; rank 0 records the steps of `profiling` between them, stored at whatever end."""
    if profiling is None or worker.rank > 0 or start_step >= profiling.last_step:
        yield batches
    else:
        with closing(recorded(batches, profiling, stage, worker.device, recorder, start_step)) as followed:
            yield followed


def recorded(
    batches: Iterator[Batch],
    profiling: Profiling,
    stage: str,
    device: torch.device,
    recorder: events.Recorder,
    start_step: int,
) -> Generator[Batch]:
    """The same batches, with steps recorded between them; at the end the trace is uploaded.
    A step lasts from the request of its batch to that of the next. No failure here ends a training."""
    first, on_gpu = max(profiling.first_step, start_step + 1), [ProfilerActivity.CUDA] if device.type == "cuda" else []
    yield from islice(batches, first - start_step - 1)
    step, profiler = first, None
    with harmless(stage, recorder):
        begun = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        begun.start()
        profiler = begun
    try:
        for step in range(first, profiling.last_step + 1):
            with record_function(f"step {step}"):
                yield next(batches)
    finally:
        if profiler is not None:
            with harmless(stage, recorder), scratch_folder("trace") as scratch:
                profiler.stop()
                folder, name = Store(profiling.folder), f"{stage}-steps-{first}-{step}.json.gz"
                profiler.export_chrome_trace(str(scratch / name))
                folder.upload(scratch / name, name)
                recorder.emit(events.Text(stage, "trace.txt", folder.url(name)))
    yield from batches


@contextmanager
def harmless(stage: str, recorder: events.Recorder) -> Iterator[None]:
    """A failure inside costs the trace, with a warning."""
    try:
        yield
    except (RuntimeError, OSError, StoreError) as error:
        logger.warning("%s: no trace", stage, exc_info=error)
        recorder.emit(events.Warning(stage, f"no trace: {str(error).partition(chr(10))[0]}"))
