"""Learners: a network with optimizer, EMA and guard, the common part of all tasks, by composition."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any, Generic

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from components.configuration.optimization import OptimizationConfig
from components.models.devices import autocast
from components.models.layers import compile_blocks, recompute_blocks
from components.sampling.device import computes_bf16
from components.training.loop import Arrays, Batch
from components.training.optim import EMA, Network, NonFiniteGuard, clip_gradients, learning_rate, make_optimizer
from components.training.parallel import Worker, data_parallel, synchronized
from components.training.power_ema import PowerEMA
from components.training.randomness import derive_seed
from components.training.sharding import clip_shards, load_weights, placed_optimizer, shard

EVALUATION_BATCH = 64


class Learner(Generic[Network]):
    """A network in training.

    `self.forward` is the data-parallel network, `self.network` the plain one; where the worker shards, both are the
    network in shards.
    """

    def __init__(
        self,
        network: Network,
        *,
        config: OptimizationConfig,
        worker: Worker,
        averaged: bool = True,
    ) -> None:
        """Builds the optimizer and, if `averaged`, the configuration's EMA; discriminators have none."""
        self.config = config
        self.worker = worker
        self.network = network if worker.shards else network.to(worker.device)
        if config.compile_network:
            compile_blocks(self.network)
        if config.gradient_checkpointing:
            recompute_blocks(self.network)
        self.copied: Callable[[Network], Network] = shard(self.network, worker) if worker.shards else deepcopy
        self.forward = data_parallel(self.network, worker)
        self.ema = make_ema(self.network, config, copied=self.copied) if averaged else None
        self.guard = NonFiniteGuard(worker.device, every=config.log_every)
        self.computes_bf16 = computes_bf16(config.precision, worker.device)

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimizer, built at its first use: networks on the meta device, only counted, have none."""
        return make_optimizer(self.network, self.config)

    def snapshot(self) -> Network:
        """The network for samples and for the artifact, in evaluation mode: the EMA, or else a copy."""
        return self.ema.network if self.ema else self.copied(self.network).eval()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where recipe and device have it; networks keep softmax, norms and losses in fp32.

        Copies in bf16 of weights in shards are not cached for the pass: they would be copies of all blocks.
        """
        device, shards = self.worker.device, self.worker.shards
        return autocast(device, enabled=self.computes_bf16, cache_enabled=not shards)

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient of `loss` to the network's parameters, and to no other network's in the graph.

        Weights gathered for a pass are not the parameters, so FSDP2 would silently give named parameters no gradient. A
        sharded network has the graph for itself: tasks with two networks are never sharded.
        """
        if self.worker.shards:
            loss.backward(retain_graph=retain_graph)
            return
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        loss.backward(inputs=trained, retain_graph=retain_graph)

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Clip, step the optimizer, clear gradients.

        Returns (taken, gradient norm before clipping), both () on the device. Only the device knows whether the step is
        taken: the fused optimizer learns it from `found_inf`, as from a gradient scaler, and leaves weights, moments
        and its count of steps unchanged after a refusal.
        """
        norm = self.clip()
        taken = self.guard.admits(norm, step=step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.found_inf = (~taken).float()  # pyrefly: ignore[missing-attribute]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken, norm

    def clip(self) -> Tensor:
        """Scale gradients to the recipe's max_grad_norm at most. Returns the joint norm before, ()."""
        if self.worker.shards:
            return clip_shards(self.network, self.worker, max_norm=self.config.max_grad_norm)
        return clip_gradients(self.network, max_norm=self.config.max_grad_norm)

    def average(self, taken: Tensor | None = None) -> None:
        """Update the EMA where the step was taken; called at the end of a step."""
        if self.ema:
            self.ema.update(self.network, taken)

    def step(self, step: int) -> Tensor:
        """`update` and `average`. Returns the gradient norm before clipping."""
        taken, norm = self.update(step)
        self.average(taken)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Tensors of network and EMA by flat names, for safetensors."""
        named = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.ema:
            for average, network in self.ema.averages.items():
                named |= {f"{average}.{name}": tensor for name, tensor in network.state_dict().items()}
        return named

    def progress(self) -> dict[str, Any]:
        """The state besides the weights. Waits for the device. Raises NonFiniteError after too many bad steps."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "ema_updates": int(self.ema.updates) if self.ema else 0,
            "non_finite": self.guard.check(),
        }

    def restore(self, weights: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Restore the results of `weights()` and `progress()`; gradients of a broken-off step are cleared.

        Tensors are whole or the calling rank's shards.
        """
        self.optimizer.zero_grad(set_to_none=True)
        load_weights(self.network, below("network.", weights))
        self.optimizer.load_state_dict(placed_optimizer(self.optimizer, progress["optimizer"]))
        self.guard.restore(progress["non_finite"], self.worker.device)
        if self.ema:
            self.ema.updates.fill_(progress["ema_updates"])
            for average, network in self.ema.averages.items():
                load_weights(network, below(f"{average}.", weights))


class LearnerTask(Generic[Network]):
    """The common part of all tasks with a single network; see `components.training.loop.Task`."""

    learner: Learner[Network]
    max_batch: int | None = None
    parts_matter: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.learner.weights(), "learner": self.learner.progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["weights"], state["learner"])

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """No images, for tasks without any."""
        del held_out, step
        return {}


def make_ema(
    network: Network, config: OptimizationConfig, *, copied: Callable[[Network], Network] = deepcopy
) -> EMA[Network] | PowerEMA[Network] | None:
    """The average of the recipe's kind; None where `ema_decay` is 0. `copied` copies a network."""
    if config.ema_decay == 0:
        return None
    if config.ema == "power":
        return PowerEMA(network, sigma_rel=config.ema_sigma_rel, copied=copied)
    return EMA(network, decay=config.ema_decay, copied=copied)


@contextmanager
def seeded(seed: int, *place: int | str) -> Iterator[None]:
    """Seeds the global CPU generator by (seed, place) inside, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "module", *place))
        yield


class Undrawn(TorchFunctionMode):
    """Leaves initial weights undrawn and not normalized, for networks without memory.

    For such networks torch would first import sympy, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func.__name__ in ("normal_", "normalize"):
            return [*args, *named.values()][0]
        return (torch.empty if func is torch.randn else func)(*args, **named)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks inside that have shapes and no numbers."""
    with torch.device("meta"), Undrawn():
        yield


@contextmanager
def initialized(seed: int, worker: Worker) -> Iterator[None]:
    """Networks built inside start with weights drawn by the seed; on the meta device with shapes alone."""
    with seeded(seed), without_memory() if worker.device.type == "meta" else nullcontext():
        yield


def accumulated(
    batch: Batch, *learners: Learner[Any], max_batch: int | None, step: int
) -> Iterator[tuple[Batch, float]]:
    """Yields parts of at most `max_batch` samples, each with its loss factor, the share of the batch.

    Gradients are averaged over the ranks with the last part only. Dropout alone draws from a global generator, which is
    seeded by (seed, step, rank, part), so a resumed run drops the same units.
    """
    config, worker = learners[0].config, learners[0].worker
    parts = list(split(batch, max_batch))
    for index, part in enumerate(parts):
        with ExitStack() as stack:
            for learner in learners:
                stack.enter_context(synchronized(learner.forward, last=index == len(parts) - 1))
            stack.enter_context(seeded(config.seed, step, worker.rank, index))
            yield part, len(part["position"]) / len(batch["position"])


def held_out_parts(
    batch: Batch, learner: Learner[Any], *, max_batch: int | None, most: int = EVALUATION_BATCH
) -> Iterator[Batch]:
    """Yields an evaluation's or preview's samples in parts of at most `most`.

    A part is never more than a training step takes at a time: a model that trains also evaluates.
    """
    share = learner.worker.share(learner.config.global_batch_size)
    return split(batch, min(max_batch or share, share, most))


def split(batch: Batch, max_batch: int | None) -> Iterator[Batch]:
    """Yields the batch in parts of at most `max_batch` samples; whole for None."""
    samples = len(batch["position"])
    for start in range(0, samples, max_batch or samples):
        yield {name: value[start : start + (max_batch or samples)] for name, value in batch.items()}


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with names that start with `prefix`, under the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
