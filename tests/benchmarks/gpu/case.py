"""One measurement on a device: a step of ours beside a step of a peer's, with what each costs by count."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from components.models.devices import autocast
from components.training.loop import Batch, Task
from components.training.step_model import StepModel, counting
from tests.benchmarks.interleaving import Step

MakeStep = Callable[[torch.device, bool], Step]  # (where, whether the network is compiled)


class Side(NamedTuple):
    make: MakeStep
    flops: int  # of one step, by count on the meta device


class Case(NamedTuple):
    name: str
    samples: int  # of a step: images, or images' tokens
    ours: Side
    peer: Side
    model: StepModel | None = None  # of ours; None: it is no training's step
    in_a_row: int = 5  # steps between two waits for the device: a training takes many, and the host works ahead


def counted(make: MakeStep) -> int:
    """Operations of a step that also runs where tensors have no numbers."""
    with torch.device("meta"), counting() as counter:
        make(torch.device("meta"), False)()
    return counter.get_total_flops()


def task_step(task: Task, batch: Batch) -> Step:
    """The step of a real training, again and again on one batch that is on its device."""
    steps = iter(range(1, task.learner.config.total_steps))  # pyrefly: ignore[missing-attribute]
    return lambda: task.train_step(batch, next(steps))


def bf16_on_gpu(device: torch.device) -> AbstractContextManager[Any]:
    """As both sides have it where they train; where they are tested and counted they keep fp32."""
    return autocast(device, enabled=device.type == "cuda")


def script_step(
    network: nn.Module, loss: Callable[[nn.Module], Tensor], *, device: torch.device, compiled: bool, ema: bool
) -> Step:
    """The step of diffusers' and transformers' training scripts: loss, clipped gradients, fused AdamW, EMA."""
    network.to(device).train()
    average = EMAModel(network.parameters(), decay=0.9999, foreach=True) if ema else None
    if compiled:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type != "meta")

    def step() -> None:
        loss(network).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.step(network.parameters())

    return step


def number_of_parameters(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        parameters: Iterable[Any] = make().parameters()
        return sum(parameter.numel() for parameter in parameters)
