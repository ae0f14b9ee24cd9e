"""Laws of `precision`: bf16 is computed where the device has it, and in fp32 elsewhere."""

from typing import Any, cast

import pytest
import torch

from components.runtime.execution import Resources
from components.sampling import device as devices
from components.training.batches import to_batch
from components.training.learner import Learner
from components.training.loop import fit
from components.training.parallel import Worker
from components.training.worker import TrainingJob, differences
from tests.pretend_gpu import GPU, pretend_gpu
from tests.tiny_training import KINDS, batches, config_of, make_task

CPU = torch.device("cpu")


def with_bf16(monkeypatch: pytest.MonkeyPatch, *those: torch.device) -> None:
    """Only these devices have bf16 of their own."""
    monkeypatch.setattr(devices, "native_bf16", lambda device: device in those)


def losses(kind: str, precision: str) -> list[float]:
    config, found = config_of(kind, precision=precision, total_steps=5), []
    fit(
        make_task(config),
        batches(config, to_batch),
        config.optimization,
        log=lambda step, metrics: found.append(metrics["loss"].item()),
    )
    return found


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_without_bf16_of_its_own_a_device_trains_as_in_fp32_bit_for_bit(kind: str, monkeypatch: pytest.MonkeyPatch):
    with_bf16(monkeypatch)
    assert losses(kind, "bf16") == losses(kind, "fp32")


def test_with_bf16_of_its_own_a_device_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bf16(monkeypatch, CPU)
    rounded, exact = losses("base", "bf16"), losses("base", "fp32")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("there", [True, False])
def test_the_device_that_trains_is_the_one_that_is_asked(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bf16 is no reason for bf16 on a GPU without it, and the other way round."""
    with_bf16(monkeypatch, GPU if there else CPU)
    config = config_of("base", precision="bf16").optimization
    with pretend_gpu(), Learner(torch.nn.Linear(2, 2), config=config, worker=Worker(device=GPU)).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if there else torch.float32)


def lines(precision: str, **share: Any) -> list[str]:
    config = config_of("base", precision=precision).optimization
    job: dict[str, Any] = dict.fromkeys(TrainingJob._fields) | {"config": config, "resources": Resources(**share)}
    return list(differences(cast(TrainingJob, TrainingJob(**job)), Worker()))


def test_one_line_says_that_fp32_takes_the_place_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bf16(monkeypatch)
    assert lines("bf16") == ["cpu has no bf16 of its own: training in fp32"]
    assert lines("fp32") == []
    with_bf16(monkeypatch, CPU)
    assert lines("bf16") == []


def test_one_line_says_that_one_worker_has_nothing_to_shard_with() -> None:
    assert lines("fp32", sharding="full") == ["sharding full needs several workers: the only one holds all"]
