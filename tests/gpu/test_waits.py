"""A GPU never waits for its host: torch itself refuses what would make it wait."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from components.training.batches import batches_ahead
from tests.on_device import TASKS, numbered_rows, steps_with_logs, sums_ahead, sums_at_once
from tests.tiny_training import SHARED

pytestmark = pytest.mark.gpu
LOG_EVERY = SHARED["log_every"]
BATCHES = 6
REFUSED = "called a synchronizing CUDA operation"


@pytest.fixture(autouse=True)
def waits_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", TASKS)
def test_no_step_waits_for_the_gpu_but_that_of_a_log_and_it_once(kind: str, gpu: torch.device) -> None:
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        for step in steps_with_logs(kind, gpu, precision="bf16"):
            mode = "default" if step == 1 else "warn" if step % LOG_EVERY == 0 else "error"
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if REFUSED in str(wait.message)]) <= 1


def test_the_debug_mode_refuses_what_waits(gpu: torch.device) -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.ones(1, device=gpu).item()


def test_batches_ahead_come_from_pinned_memory_without_a_wait_and_whole(gpu: torch.device) -> None:
    """The GPU is kept busy, so that a copy that came too late or was overwritten would be seen."""
    assert sums_ahead(gpu, count=BATCHES, work=50) == pytest.approx(sums_at_once(BATCHES))


def test_no_batch_that_is_asked_for_makes_the_host_wait(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, pin = [], torch.Tensor.pin_memory

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(pin(tensor))
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", seen)
    torch.cuda.set_sync_debug_mode("error")
    arrived = [batch["image"] for batch in batches_ahead(numbered_rows(BATCHES), gpu)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(image.device == gpu for image in arrived)
    assert len(pinned) >= BATCHES
    assert all(tensor.is_pinned() for tensor in pinned)
