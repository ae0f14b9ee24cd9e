"""What a training tells of its speed: figures that agree with a clock, and none that nobody knows."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pynvml
import pytest
import torch

from components.evaluation.measures import MEASURES, measures_of
from components.runtime import events
from components.training.batches import to_batch
from components.training.loop import Batch, Task, fit
from components.training.parallel import ALONE, Worker
from components.training.reporting import (
    Elapsed,
    Reporter,
    counted_flops,
    flops_measures,
    gpu_utilization,
    peak_flops,
    speed_measures,
)
from tests.distributed.recording import FileRecorder
from tests.tiny_training import batches, config_of, make_task

GPUS = Worker(rank=0, world_size=8, device=torch.device("cuda", 0))
ON_GPUS_ALONE = {"samples_per_second_per_gpu", "mfu", "gpu_utilization"}
STEP_FLOPS = 5e8


def late(rows: Iterator[Batch], *, seconds: float) -> Iterator[Batch]:
    for batch in rows:
        time.sleep(seconds)
        yield batch


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a tiny training that waits 0.1 s for each of its batches, and 0.5 s for its checkpoint."""
    config = config_of("pixelcnn", total_steps=8, log_every=4, checkpoint_every=2)
    recorder = FileRecorder(tmp_path_factory.mktemp("speed") / "log.jsonl")
    options: dict[str, Any] = {"stage": "base", "worker": ALONE, "recorder": recorder, "start_step": 0}
    reporter = Reporter(config.optimization, **options, step_flops=STEP_FLOPS)

    def save(step: int, task: Task) -> None:
        time.sleep(0.5 if step == 2 else 0)
        reporter.held_seconds += 0.5 if step == 2 else 0

    rows = reporter.timed(late(batches(config, to_batch), seconds=0.1))
    fit(make_task(config), rows, config.optimization, log=reporter.log, save=save)
    return recorder.lines("metrics")


def test_what_a_training_tells_agrees_with_a_clock(told: list[dict[str, Any]]) -> None:
    for line, seconds in zip(told, (0.9, 0.4), strict=True):  # at least
        taken = 4 * 8 / line["samples_per_second"]
        assert taken > seconds
        assert 0.4 <= line["data_wait_fraction"] * taken < taken
        assert line["achieved_gflops"] == pytest.approx(4 * STEP_FLOPS / taken / 1e9)
    assert [line.get("checkpoint_hold_seconds") for line in told] == [0.5, None]


def test_seconds_of_all_tries_are_summed_by_the_clock_and_of_the_processor() -> None:
    config = config_of("pixelcnn", total_steps=8).optimization
    options: dict[str, Any] = {"stage": "base", "worker": ALONE, "recorder": events.Recorder(), "start_step": 4}
    reporter = Reporter(config, **options, before=Elapsed(100.0, 50.0))
    while time.process_time() - reporter.cpu_started < 0.3:
        pass
    time.sleep(1.0)
    summary = reporter.summary(8)
    assert 101.3 <= summary["train_seconds"] < 150 > 51 > summary["cpu_seconds"] >= 50.3
    assert reporter.elapsed().cpu >= summary["cpu_seconds"]


def test_memory_is_that_of_this_process_where_there_is_no_gpu(told: list[dict[str, Any]]) -> None:
    before, most = told[-1]["peak_memory_gb"], torch.ones(300_000_000, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss / 1e9
    del most
    after = speed_measures(ALONE, samples=1, steps=1, seconds=1.0)["peak_memory_gb"]
    assert before > 0.1
    assert 0.99 * resident < after < resident + before


def test_a_cpu_tells_nothing_that_only_gpus_have(told: list[dict[str, Any]]) -> None:
    assert not ON_GPUS_ALONE & {name for line in told for name in line}
    assert set(MEASURES) - ON_GPUS_ALONE <= {name for line in told for name in line}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of it
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(("name", "told"), [("NVIDIA H100 PCIe", {"mfu": 0.25}), ("new", {"achieved_gflops": 1.512e6})])
def test_mfu_is_over_the_peak_of_all_gpus(monkeypatch: pytest.MonkeyPatch, name: str, told: dict[str, float]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops_measures(0.25 * 8 * 756e12, GPUS) == pytest.approx(told)


def test_each_gpu_has_its_share_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2e10)
    values = speed_measures(GPUS, samples=640, steps=2, seconds=4.0, utilization=[0.5, 1.0])
    expected = {"samples_per_second": 160.0, "samples_per_second_per_gpu": 20.0, "gpu_utilization": 0.75}
    assert values == pytest.approx(expected | {"peak_memory_gb": 20.0})


def test_a_machine_without_a_driver_is_asked_in_vain_and_nothing_fails() -> None:
    assert pynvml.__name__ in sys.modules  # the real library
    assert len(gpu_utilization(torch.device("cuda", 0))) == torch.cuda.is_available()
    assert gpu_utilization(torch.device("cpu")) == []


def test_operations_are_counted_in_rank_0_and_nothing_that_fails_or_draws_there_touches_training() -> None:
    def draws() -> float:
        return float(torch.rand(3).numel())

    def fails() -> float:
        raise NotImplementedError("no such kernel on the meta device")

    before = torch.get_rng_state()
    assert counted_flops(draws, ALONE) == 3.0
    assert counted_flops(draws, Worker(rank=1, world_size=2)) is counted_flops(None, ALONE) is None
    assert counted_flops(fails, ALONE) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_has_the_middle_of_its_rates_its_most_memory_and_all_that_checkpoints_took() -> None:
    points = [
        {"samples_per_second": 5.0, "peak_memory_gb": 2.0, "loss": 1.0},
        {"samples_per_second": 50.0, "peak_memory_gb": 3.0, "checkpoint_hold_seconds": 2.0},
        {"samples_per_second": 51.0, "peak_memory_gb": 3.0, "checkpoint_hold_seconds": 1.5},
    ]
    expected = {"samples_per_second": 50.0, "peak_memory_gb": 3.0, "checkpoint_hold_seconds": 3.5}
    assert measures_of(points) == expected
    assert measures_of([{"loss": 1.0}]) == {}
