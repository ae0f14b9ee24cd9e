"""What tests do on a device that they are given: a GPU where one has to be, the CPU, or the meta device of torch."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from components.configuration.optimization import Precision
from components.models.layers import GroupNorm
from components.runtime.events import Recorder
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.training.batches import batches_ahead, to_batch
from components.training.loop import Arrays
from components.training.parallel import Worker
from components.training.reporting import Reporter
from tests.tiny_text_image import classifier_config, contrastive_config, prior_config, prior_task
from tests.tiny_training import KINDS, batches, config_of, make_task, rows_at

OTHERS = {"contrastive": contrastive_config, "diffusion_prior": prior_config, "classifier": classifier_config}
TASKS = (*KINDS, "gan", "vlb", "edm", "flow", *OTHERS)
SAMPLES = 8  # of a batch


def steps_with_logs(kind: str, device: torch.device, **changes: Any) -> Iterator[int]:
    """Each step, before it is taken and told of: the first, in which tables go to the device, and `log_every` more."""
    config = OTHERS[kind](**changes) if kind in OTHERS else config_of(kind, **changes)
    worker = Worker(device=device)
    reporter = Reporter(config.optimization, worker=worker, stage="test", recorder=Recorder(), start_step=0)
    task = (prior_task if kind == "diffusion_prior" else make_task)(config, worker=worker)
    stream = batches(config, partial(to_batch, device=device))
    for step in range(1, config.optimization.log_every + 2):
        yield step
        reporter.log(step, task.train_step(next(stream), step))


def losses_and_norms(kind: str, device: torch.device, *, steps: int = 4, **changes: Any) -> list[float]:
    """Loss and norm of the gradient of each step, none of which drops a unit."""
    undropped = {} if kind in ("tokenizer", "dit") else {"dropout": 0.0}
    config = config_of(kind, **undropped | changes)
    task, stream = make_task(config, worker=Worker(device=device)), batches(config, partial(to_batch, device=device))
    told = [task.train_step(next(stream), step) for step in range(1, steps + 1)]
    return [float(metrics[name]) for metrics in told for name in ("loss", "grad_norm")]


class Errors(NamedTuple):
    """Largest errors of products in fp32, as shares of the largest value."""

    matrices: float
    convolutions: float


def errors_of_products(device: torch.device) -> Errors:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    image = torch.randn(2, 64, 32, 32, generator=generator, dtype=torch.float64)
    kernel = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64)
    pairs = []
    for function, given in ((torch.matmul, (a, b)), (nn.functional.conv2d, (image, kernel))):
        exact = function(*given)
        found = function(*(tensor.float().to(device) for tensor in given)).cpu().double()
        pairs.append(float((found - exact).abs().max() / exact.abs().max()))
    return Errors(*pairs)


def norm_of_16_bits(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a group norm gives for bf16, and the same in fp32 from the CPU."""
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = GroupNorm(16)
    return norm.to(device)(x.to(device)).detach().cpu(), norm.cpu()(x.float()).detach()


class Company(NamedTuple):
    """Images (N, H, W, 3) of the same requests, as whole numbers."""

    together: np.ndarray
    alone: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """Gray levels between them."""
        return np.abs(self.together - self.alone)


def in_company(folder: Path, device: torch.device, *, generator: str, precision: Precision) -> Company:
    """Requests to a cascade all at once, and each alone."""
    cascade = replace(Cascade.load(folder, device=device), precision=precision)
    asked = [Request(label=seed % 3, seed=seed, generator=generator) for seed in range(5)]
    made = (np.stack(cascade.sample(asked, batch_size=size)).astype(int) for size in (len(asked), 1))
    return Company(*made)


def numbered_rows(count: int) -> Iterator[Arrays]:
    config = config_of("base")
    for index in range(count):
        yield rows_at(config, range(SAMPLES * index, SAMPLES * (index + 1)))


def sums_ahead(device: torch.device, *, count: int, work: int = 0) -> list[float]:
    """Sums of the images of batches that come one ahead, taken after so many products that keep the device busy."""
    busy, sums = torch.eye(512, device=device), []
    for batch in batches_ahead(numbered_rows(count), device):
        for _ in range(work):
            busy = busy @ busy
        sums.append(batch["image"].double().sum() + 0 * busy.sum())
    return torch.stack(sums).tolist()


def sums_at_once(count: int) -> list[float]:
    """The same without any device."""
    return [float(to_batch(rows)["image"].double().sum()) for rows in numbered_rows(count)]
