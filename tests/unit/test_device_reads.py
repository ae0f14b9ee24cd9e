"""Laws of a device that never waits for its host: what steps of each task read from it, counted on the meta device."""

import numpy as np
import pytest
import torch

from components.training.batches import to_batch
from components.training.optim import move_masked
from tests.device_reads import META, device_reads
from tests.on_device import TASKS, steps_with_logs

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "tolist": torch.Tensor.tolist,
    "cpu": torch.Tensor.cpu,
    "nonzero": torch.nonzero,
    "mask as an index": lambda x: x[x > 0],
    "values behind a mask": lambda x: x.__setitem__(x > 0, x[:3]),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "list to the device": lambda x: torch.tensor([1, 2], device=x.device),
    "pageable memory": lambda x: torch.zeros(2).to(x.device, non_blocking=True),
    "pinned memory, blocking": lambda x: torch.zeros(2).pin_memory().to(x.device),
}
FREE = {
    "arithmetic": lambda x: (x * 2).where(x > 0, 1.0),
    "pinned memory": lambda x: torch.zeros(2).pin_memory().to(x.device, non_blocking=True),
    "a copy to look at later": lambda x: x.to("cpu", non_blocking=True),
    "a number of the host": lambda x: x.__setitem__(0, 1),
    "a generator's numbers": lambda x: x.normal_(generator=torch.Generator(x.device).manual_seed(1)),
    "clipped gradients": lambda x: torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(x)], 1.0),
}


@pytest.mark.parametrize("what", [*WAITS, *FREE])
def test_every_kind_of_wait_is_counted_once_and_nothing_else_is(what: str) -> None:
    with device_reads() as reads:
        (WAITS | FREE)[what](torch.zeros(3, device=META))
    assert reads.counts.total() == (what in WAITS)


@pytest.mark.parametrize("kind", TASKS)
def test_the_host_waits_for_the_device_at_most_once_in_log_every_steps(kind: str) -> None:
    """The step of the log among them, after the first step."""
    with device_reads() as reads:
        for step in steps_with_logs(kind, META):
            if step == 2:
                reads.counts.clear()
    assert reads.counts.total() <= 1, reads.counts


def test_a_bad_step_that_only_the_device_knows_of_moves_no_average() -> None:
    """Where the host does not look: else torch's fused descent interpolates."""
    averages, masters = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    before = [average.clone() for average in averages]
    weight = torch.tensor(0.3, dtype=torch.float64)
    move_masked(averages, masters, weight=weight, taken=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    move_masked(averages, masters, weight=weight, taken=torch.tensor(True))
    for moved, old, master in zip(averages, before, masters, strict=True):
        torch.testing.assert_close(moved, torch.lerp(old, master, 0.3))


def test_a_batch_on_a_cpu_shares_the_memory_of_its_rows_also_where_that_must_not_be_written_to() -> None:
    tokens = np.arange(6).reshape(2, 3)
    tokens.flags.writeable = False
    assert to_batch({"tokens": tokens})["tokens"].data_ptr() == tokens.ctypes.data
