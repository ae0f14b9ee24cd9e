"""Laws of a device that never waits for its host: what steps of each task read from it, counted on the meta device."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from components.events import SilentRecorder
from components.training.batches import to_batch
from components.training.frozen import Encoder, image_encoder, text_encoder
from components.training.loop import Task
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
from tests.tiny_training import KINDS, batches, config_of, make_task

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
def test_whole_steps_of_every_task_run_on_the_meta_device(kind: str) -> None:
    assert waits_of(kind, steps=1).total() < 100
