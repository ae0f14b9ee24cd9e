"""Learners, networks with optimizer, EMA and guard, and the common part of all tasks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from components.configuration.conditions import IMAGES, DatasetInfo, TokenGrid
from components.configuration.config import refuse
from components.configuration.optimization import OptimizationConfig, Training
from components.models.autoencoder import Autoencoder
from components.models.bundle import NETWORKS
from components.models.critics import PatchDiscriminator
from components.models.devices import autocast
from components.models.diffusion.objective import Objective, make_objective
from components.models.gan import ProjectionDiscriminator
from components.models.layers import compile_blocks, recompute_blocks
from components.sampling.device import computes_bf16
from components.training import optim
from components.training.adapters import add_adapter
from components.training.batches import png_grid, to_batch, with_positions
from components.training.frozen import LoadEncoder, encoded
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker, data_parallel
from components.training.randomness import Draws, derive_seed, dropped_conditions
from components.training.sharding import average_copies, clip, load_weights, placed_optimizer, shard

PREVIEW_SAMPLES = 8
DISCRIMINATORS: dict[str, type[nn.Module]] = {  # by the kind of the network trained against it
    "autoencoder": PatchDiscriminator,
    "gan": ProjectionDiscriminator,
}


def make_network(training: Training, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> Any:
    """The network to be stored, with initial weights. Errors as in `Training.network_arguments`."""
    return NETWORKS[training.network.kind](**training.network_arguments(dataset_info, grid))


class Learner:
    """A network in training: `forward` is data-parallel, `network` plain; with shards both are sharded."""

    def __init__(self, network: Any, *, config: OptimizationConfig, worker: Worker, averaged: bool = True) -> None:
        """Builds the EMA if `averaged`. Raises ValueError for parts that the network does not have."""
        self.config, self.worker = config, worker
        optim.freeze_parts(network, config.parts)
        self.network = network if worker.shards else network.to(worker.device)
        if config.compile_network:
            compile_blocks(self.network)
        if config.gradient_checkpointing:
            recompute_blocks(self.network)
        self.copied: Callable[[Any], Any] = shard(self.network, worker) if worker.shards else deepcopy
        self.forward = data_parallel(self.network, worker)
        power = optim.power_decays(config.ema_sigma_rel) if config.ema == "power" else None
        decays = power or {"ema": partial(optim.decay_at, decay=config.ema_decay)}
        self.ema = optim.EMA(self.network, decays, copied=self.copied) if averaged and config.ema_decay > 0 else None
        self.guard = optim.NonFiniteGuard(worker.device, every=config.log_every)
        self.computes_bf16 = computes_bf16(config.precision, worker.device)

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimizer, built at its first use: networks on the meta device, only counted, have none."""
        return optim.make_optimizer(self.network, self.config)

    def snapshot(self) -> Any:
        """The network for samples and for the artifact, in evaluation mode: the EMA, or else a copy."""
        return self.ema.network if self.ema else self.copied(self.network).eval()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where recipe and device have it; networks keep softmax, norms and losses in fp32.
        Copies in bf16 of weights in shards are not cached for the pass: they would be copies of all blocks."""
        return autocast(self.worker.device, enabled=self.computes_bf16, cache_enabled=not self.worker.shards)

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient of `loss` to the network's parameters, and to no other network's in the graph.
        Weights gathered for a pass are not the parameters, so FSDP2 would silently give named parameters no gradient. A
        sharded network has the graph for itself: tasks with two networks are never sharded."""
        if self.worker.shards:
            loss.backward(retain_graph=retain_graph)
            return
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        loss.backward(inputs=trained, retain_graph=retain_graph)

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Clip, step the optimizer, clear gradients. Returns (taken, norm before clipping), () on the device.
        Only the device knows whether the step is taken: the fused optimizer learns it from `found_inf`, as from a
        gradient scaler, and leaves weights, moments and its count of steps unchanged after a refusal."""
        norm = clip(self.network, self.worker, max_norm=self.config.max_grad_norm)
        taken = self.guard.admits(norm, step=step)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(self.config, step) * group.get("factor", 1.0)
        self.optimizer.found_inf = (~taken).float()  # pyrefly: ignore[missing-attribute]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken, norm

    def average(self, taken: Tensor | None = None) -> None:
        """Update the EMA where the step was taken; called at the end of a step."""
        if self.ema:
            self.ema.update(self.network, taken)

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
        """Restore `weights()`, whole or the rank's shards, and `progress()`; gradients are cleared."""
        self.optimizer.zero_grad(set_to_none=True)
        load_weights(self.network, below("network.", weights))
        self.optimizer.load_state_dict(placed_optimizer(self.optimizer, progress["optimizer"]))
        self.guard.restore(progress["non_finite"], self.worker.device)
        if self.ema:
            self.ema.updates.fill_(progress["ema_updates"])
            for average, network in self.ema.averages.items():
                load_weights(network, below(f"{average}.", weights))


class LearnerTask:
    """The common part of all `Task`s: `part_losses` to learn from, `measures` to judge the average."""

    config: Any
    grid: Any  # TokenGrid, or None for a training on images
    max_batch: int | None = None
    parts_matter: bool = False
    evaluation_batch = 64  # most held-out samples at a time
    previews = "samples"  # name of the images by `shown`

    def __init__(
        self,
        config: Training,
        *,
        dataset_info: DatasetInfo = IMAGES,
        grid: TokenGrid | None = None,
        load_encoders: Sequence[LoadEncoder] = (),
        load_tokenizer: Callable[[], Autoencoder] | None = None,
        load_start: Callable[[nn.Module], None] | None = None,
        worker: Worker = ALONE,
    ) -> None:
        """Builds the networks; for other arguments see `components.training.step_model.task_maker`.
        `load_start` gives the network the weights to start from; None: they are drawn, or restored."""
        self.config, self.dataset_info, self.grid, self.worker = config, dataset_info, grid, worker
        self.seed, self.load_tokenizer, self.load_start = config.optimization.seed, load_tokenizer, load_start
        self.draw = Draws(self.seed, worker.device)
        self.parts_matter = self.parts_matter or getattr(config.network, "dropout", 0.0) > 0
        self.encoders = [load(worker.device) for load in load_encoders]
        self.make_learners()

    def autocast(self) -> AbstractContextManager[Any]:
        """The learner's precision for losses to learn from; fp32 for figures that compare models."""
        return self.learner.autocast() if torch.is_grad_enabled() else nullcontext()

    def make_learners(self) -> None:
        """Build the network and its learner."""
        with initialized(self.seed, self.worker):
            network = self.started_network()
        self.learner = Learner(network, config=self.config.optimization, worker=self.worker)

    def started_network(self) -> Any:
        """The network to be stored, with weights that are drawn and, where there is a start, its own."""
        network = make_network(self.config, self.dataset_info, self.grid)
        if self.load_start is not None and not next(network.parameters()).is_meta:
            self.load_start(network)
        if self.config.adapter is not None:
            add_adapter(network, self.config.adapter, new=self.config.init_from.ignore)
        return network

    @cached_property
    def objective(self) -> Objective:
        """The objective of a diffusion process; its tables stay on the device."""
        return make_objective(self.config.process.objective())

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Take a step along the mean of `part_losses`."""
        totals: Metrics = {}
        for part, share in self.accumulated(batch, self.learner, step=step):
            metrics = self.part_losses(encoded(part, self.encoders))
            self.learner.backward(metrics["loss"] * share)
            add(totals, metrics, share)
        taken, norm = self.learner.update(step)
        self.learner.average(taken)
        return {**totals, "grad_norm": norm}

    def part_losses(self, part: Batch) -> Metrics:
        """Means over a part of a batch: `loss`, to go backward, and further metrics, all ()."""
        raise NotImplementedError

    def measures(self, network: Any, part: Batch) -> Metrics:
        """Means of the averaged `network` over a part of the held-out samples, for `evaluate`."""
        raise NotImplementedError

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        """Yields the rows of a preview for each part, each (B, 3, H, W); nothing for a task without images."""
        return iter(())

    def conditions(self, part: Batch) -> dict[str, Tensor]:
        """The model's conditions: label (B,), text (B, L), condition (B, M), image_embedding (B, E)…"""
        return {name: part[name] for name in self.config.conditioning.conditions}

    def dropped(self, part: Batch) -> dict[str, Tensor]:
        """The conditions, some of them replaced by nulls as the recipe has it."""
        return dropped_conditions(part, self.config.conditioning, self.dataset_info, seed=self.seed)

    def accumulated(self, batch: Batch, *learners: Learner, step: int) -> Iterator[tuple[Batch, float]]:
        """Yields parts of at most `max_batch` samples, each with its loss factor, the share of the batch.
        Gradients are averaged over the ranks with the last part only, and never in a rank by itself; those in shards
        each time. Dropout alone draws from a global generator, seeded so that a resumed run drops the same units."""
        parts = list(split(batch, self.max_batch))
        for index, (part, share) in enumerate(parts):
            with ExitStack() as stack:
                for network in (learner.forward for learner in learners):
                    early = index < len(parts) - 1
                    if isinstance(network, DistributedDataParallel) and (early or dist.get_world_size() == 1):
                        stack.enter_context(network.no_sync())
                    average_copies(network, self.worker, now=not early)
                stack.enter_context(seeded(self.seed, step, self.worker.rank, index))
                yield part, share

    @property
    def samples_at_once(self) -> int:
        """Most samples of an evaluation or preview at a time, at most as in training: what trains evaluates."""
        share = self.worker.share(self.config.optimization.global_batch_size)
        return min(self.max_batch or share, share, self.evaluation_batch)

    def held_out_parts(self, held_out: Arrays) -> Iterator[tuple[Batch, float]]:
        """Yields held-out samples in parts, with columns of frozen networks, each with its share."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        for part, share in split(batch, self.samples_at_once):
            yield encoded(part, self.encoders), share

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Means of `measures` over held-out samples, by the averaged weights, with draws that never change."""
        network, totals = self.learner.snapshot(), dict[str, float]()
        for part, share in self.held_out_parts(held_out):
            add(totals, {name: float(value) for name, value in self.measures(network, part).items()}, share)
        return totals

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Images of the first held-out samples, by `shown`."""
        del step
        first = {name: column[:PREVIEW_SAMPLES] for name, column in held_out.items()}
        parts = self.shown(part for part, _ in self.held_out_parts(first))
        rows = [torch.cat(row) for row in zip(*parts, strict=True)]
        return {self.previews: png_grid(torch.cat(rows), columns=len(rows[0]))} if rows else {}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.learner.weights(), "learner": self.learner.progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["weights"], state["learner"])


class AdversarialTask(LearnerTask):
    """A task of a generator, which alone is stored, and a discriminator; None for a recipe without any."""

    discriminator: Any = None  # Learner

    @property
    def generator(self) -> Learner:
        return self.learner

    def make_learners(self) -> None:
        """Build both networks and their learners. Raises ValueError for a frozen layer that the losses weigh."""
        config: OptimizationConfig = self.config.optimization
        with initialized(self.seed, self.worker):
            generator = self.started_network()
            arguments = self.config.discriminator_arguments(self.dataset_info)
            discriminator = None if arguments is None else DISCRIMINATORS[self.config.network.kind](**arguments)
        generator.to(memory_format=torch.channels_last)
        self.learner = Learner(generator, config=config, worker=self.worker)
        if discriminator is not None:
            last: nn.Parameter | None = getattr(generator, "last_layer", None)
            refuse(
                last is not None and not last.requires_grad, "parts: the adaptive weight needs the last layer to train"
            )
            discriminator.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
            rate = getattr(config, "discriminator_learning_rate", config.learning_rate)
            own = config.replace(learning_rate=rate, parts={})
            self.discriminator = Learner(discriminator, config=own, worker=self.worker, averaged=False)

    @property
    def learners(self) -> dict[str, Learner]:
        """Both learners by their names in checkpoints."""
        return {"generator": self.learner} | ({"discriminator": self.discriminator} if self.discriminator else {})

    def state_dict(self) -> dict[str, Any]:
        named = {name: learner.weights() for name, learner in self.learners.items()}
        weights = {f"{name}.{key}": tensor for name, own in named.items() for key, tensor in own.items()}
        return {"weights": weights} | {name: learner.progress() for name, learner in self.learners.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, learner in self.learners.items():
            learner.restore(below(f"{name}.", state["weights"]), state[name])


@contextmanager
def seeded(seed: int, *place: int | str) -> Iterator[None]:
    """Seeds the global CPU generator by (seed, place) inside, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "module", *place))
        yield


class Undrawn(TorchFunctionMode):
    """Leaves weights undrawn in networks without memory: torch would import sympy, a second."""

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
    """Networks built inside draw weights by the seed; on meta and ranks > 0 of shards shapes alone."""
    bare = worker.device.type == "meta" or (worker.shards and worker.rank > 0)
    with seeded(seed), without_memory() if bare else nullcontext():
        yield


def add(totals: dict[str, Any], metrics: dict[str, Any], share: float) -> None:
    """Add metrics of a share of the samples to `totals`, without a gradient."""
    for name, value in metrics.items():
        own = value.detach() if isinstance(value, Tensor) else value
        totals[name] = totals.get(name, 0.0) + own * share


def split(batch: Batch, max_batch: int | None) -> Iterator[tuple[Batch, float]]:
    """Yields parts of at most `max_batch` samples, each with its share of the batch; the whole for None."""
    samples = len(batch["position"])
    for start in range(0, samples, max_batch or samples):
        part = {name: value[start : start + (max_batch or samples)] for name, value in batch.items()}
        yield part, len(part["position"]) / samples


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with names that start with `prefix`, under the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
