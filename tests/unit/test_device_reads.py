"""Laws of a device that never waits for its host: what steps of each task read from it, counted on the meta device."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from components.events import SilentRecorder
from components.training.batches import one_ahead, to_batch
from components.training.frozen import Encoder, image_encoder, text_encoder
from components.training.loop import Task
from components.training.optim import move_masked
from components.training.parallel import Worker
from components.training.reporting import Reporter
from components.training.tasks.diffusion_prior import DiffusionPriorTask
from tests.device_reads import META, device_reads
from tests.tiny_text_image import (
    PRIOR_DATASET_INFO,
    classifier_config,
    classifier_task,
    contrastive_config,
    contrastive_task,
    frozen_contrastive,
    prior_config,
)
from tests.tiny_training import KINDS, SHARED, batches, config_of, make_task

WORKER = Worker(device=META)
OTHERS = {"contrastive": contrastive_config, "diffusion_prior": prior_config, "classifier": classifier_config}
TASKS = (*KINDS, "gan", "vlb", "edm", "flow", *OTHERS)


def task_on_device(kind: str, config: Any) -> Task:
    if kind == "diffusion_prior":
        loaders = (load_image_encoder, load_text_encoder)
        return DiffusionPriorTask(config, dataset_info=PRIOR_DATASET_INFO, load_encoders=loaders, worker=WORKER)
    make = {"contrastive": contrastive_task, "classifier": classifier_task}.get(kind, make_task)
    return make(config, worker=WORKER)


def load_image_encoder(device: torch.device) -> Encoder:
    return image_encoder(frozen_contrastive().network.to(device))


def load_text_encoder(device: torch.device) -> Encoder:
    text = frozen_contrastive()
    text.network.to(device)
    return text_encoder(text)


def waits_of(kind: str, *, steps: int) -> Counter[str]:
    """Where the host waits for the device in `steps` steps, those of the logs among them; the first step is not
    counted, in which tables go to the device."""
    config = OTHERS[kind]() if kind in OTHERS else config_of(kind)
    numbers = {"worker": WORKER, "stage": "test", "recorder": SilentRecorder(), "start_step": 0}
    with device_reads() as reads:
        task, reporter = task_on_device(kind, config), Reporter(config.optimization, **numbers)
        stream = batches(config, partial(to_batch, device=META))
        for step in range(1, steps + 2):
            reporter.log(step, task.train_step(next(stream), step))
            if step == 1:
                reads.counts.clear()
    return reads.counts


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


@pytest.mark.parametrize("what", WAITS)
def test_every_kind_of_wait_is_counted_once(what: str) -> None:
    with device_reads() as reads:
        WAITS[what](torch.zeros(3, device=META))
    assert reads.counts.total() == 1


@pytest.mark.parametrize("what", FREE)
def test_what_does_not_wait_is_not_counted(what: str) -> None:
    with device_reads() as reads:
        FREE[what](torch.zeros(3, device=META))
    assert not reads.counts


@pytest.mark.parametrize("kind", TASKS)
def test_the_host_waits_for_the_device_at_most_once_in_log_every_steps(kind: str) -> None:
    waits = waits_of(kind, steps=SHARED["log_every"])
    assert waits.total() <= 1, waits


def test_a_bad_step_that_only_the_device_knows_of_moves_no_average() -> None:
    """Where the host does not look, a weight of 0 leaves every bit, and any other one interpolates."""
    averages, masters = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    before = [average.clone() for average in averages]
    move_masked(averages, masters, weight=torch.zeros((), dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    move_masked(averages, masters, weight=torch.tensor(0.3, dtype=torch.float64))
    for moved, old, master in zip(averages, before, masters, strict=True):
        torch.testing.assert_close(moved, torch.lerp(old, master, 0.3))


def test_batches_are_the_same_one_ahead_and_each_is_asked_for_before_the_one_before_it_is_used() -> None:
    asked: list[int] = []
    items = one_ahead(asked.append(number) or number for number in range(4))
    seen = [(item, list(asked)) for item in items]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]


def test_a_batch_on_a_cpu_shares_the_memory_of_its_rows_also_where_that_must_not_be_written_to() -> None:
    tokens = np.arange(6).reshape(2, 3)
    tokens.flags.writeable = False
    assert to_batch({"tokens": tokens})["tokens"].data_ptr() == tokens.ctypes.data
