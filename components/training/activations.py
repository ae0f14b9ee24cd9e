"""The bytes that a step of a training keeps between its forward and its backward pass, told from its configuration.

The task itself goes forward on torch's meta device, in the recipe's precision as a GPU would, with so many samples and
with twice as many: the difference is what each sample keeps. The rest does not grow: in bf16, above all, the copies of
weights that their gradients need.

Not counted is what lives for a moment (outputs that nothing needs later, gradients between layers, workspaces of
kernels), what fragments a GPU's memory, and what frozen networks that make columns need. Compiled blocks keep less.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import (
    AnyTraining,
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.training.building import IMAGES
from components.training.flops import given_conditions, perceptual_loss
from components.training.kept import GPUKernels, Kept, as_it_is, kept_by
from components.training.learner import Learner
from components.training.loop import Batch
from components.training.parallel import Worker
from components.training.sizes import without_memory
from components.training.tasks.autoencoder import AutoencoderTask
from components.training.tasks.classifier import ClassifierTask
from components.training.tasks.contrastive import ContrastiveTask
from components.training.tasks.diffusion import DiffusionTask
from components.training.tasks.diffusion_prior import DiffusionPriorTask
from components.training.tasks.gan import GANTask
from components.training.tasks.image_to_image import ImageToImageTask
from components.training.tasks.masked_prior import MaskedPriorTask
from components.training.tasks.pixels import PixelTask
from components.training.tasks.prior import PriorTask

META = Worker(device=torch.device("meta"))


class UncountedError(Exception):
    """What a step keeps can't be told without its numbers; the message says why."""


class Linear(NamedTuple):
    """Bytes of any number of samples at a time."""

    fixed: int
    sample: int

    @classmethod
    def through(cls, once: int, twice: int, *, unit: int) -> "Linear":
        """Of what `unit` samples keep, and twice as many."""
        sample = (twice - once) // unit
        return cls(once - unit * sample, sample)

    def of(self, samples: int) -> int:
        return self.fixed + samples * self.sample


class Activations(NamedTuple):
    """What a step keeps; see `components.training.kept.Kept`."""

    whole: Linear
    recomputed: Linear
    block: Linear

    def needed(self, *, recompute: bool, sharded: bool) -> Linear:
        """At most, at any time of a step. Where blocks are computed again, one of them is whole meanwhile; the copies
        in bf16 of all weights last until the forward pass ends, but for those of weights in shards."""
        if not recompute:
            return self.whole
        fixed = self.recomputed.fixed + self.block.fixed
        return Linear(fixed if sharded else max(fixed, self.whole.fixed), self.recomputed.sample + self.block.sample)


def activations(
    training: AnyTraining, dataset_info: DatasetInfo = IMAGES, *, grid: TokenGrid | None = None
) -> Activations:
    """What a device keeps in the last step of a training, when every loss has begun.

    Args:
        dataset_info: what the data set conditions on.
        grid: of the tokens that a prior learns; None for what learns images.

    Raises UncountedError where the step reads numbers, which the meta device has none of; ValueError for a data set
    that the training can't learn from, PerceptualWeightsError where the package of its perceptual network is missing.
    """
    unit = training.optimization.discriminator_steps if isinstance(training, GANTraining) else 1  # as equal parts
    with GPUKernels():
        task = task_without_memory(training, dataset_info, grid)
        batches = [batch_without_memory(training, dataset_info, grid, samples=factor * unit) for factor in (1, 2)]
        try:
            once, twice = (step_keeps(task, batch) for batch in batches)
        except (NotImplementedError, RuntimeError) as error:  # what torch says where a shape depends on numbers
            raise UncountedError(f"its step reads numbers of the device: {str(error).splitlines()[0]}") from error
    pairs = list(zip(once, twice, strict=True))  # a GAN's step has two passes: at most the larger one's is kept
    blocks = [block for one, two in pairs for block in zip(one.blocks, two.blocks, strict=True)]
    return Activations(
        whole=largest(Linear.through(one.whole, two.whole, unit=unit) for one, two in pairs),
        recomputed=largest(Linear.through(one.recomputed, two.recomputed, unit=unit) for one, two in pairs),
        block=largest(Linear.through(*block, unit=unit) for block in blocks),
    )


def largest(lines: Iterable[Linear]) -> Linear:
    """What is never below any of these."""
    fixed, sample = zip(*lines, strict=True)
    return Linear(max(fixed), max(sample))


def step_keeps(task: Any, batch: Batch) -> list[Kept]:
    """What the passes of a step with this batch keep, one after another, on any device."""
    networks = [value.network for value in vars(task).values() if isinstance(value, Learner)]
    step = task.config.optimization.total_steps
    return [kept_by(forward, *networks) for forward in passes(task, batch, step=step)]


def passes(task: Any, batch: Batch, *, step: int) -> list[Callable[[], Any]]:
    """The passes of a step of which each is done with what it kept before the next one begins."""
    match task:
        case AutoencoderTask():
            return [partial(task.backward, batch, 1.0, step=step, ratio=None)]
        case GANTask():
            turns = task.config.optimization.discriminator_steps
            part = {name: value[::turns] for name, value in batch.items()}
            return [partial(task.train_discriminator, part, step), partial(task.train_generator, batch, step)]
        case ContrastiveTask():
            return [partial(pulled, task, batch)]
        case DiffusionTask():
            return [partial(task.loss, batch)]
        case PriorTask():
            return [partial(task.trained_losses, batch)]
        case MaskedPriorTask() | PixelTask() | DiffusionPriorTask() | ClassifierTask():
            return [partial(task.trained_loss, batch)]
    raise TypeError(f"no pass is known of a {type(task).__name__}")


def pulled(task: ContrastiveTask, batch: Batch) -> Any:
    """What a contrastive batch goes backward through. The gradients at its embeddings are known by then, and what they
    needed is gone."""
    embeddings = task.embed(task.learner.forward, batch)
    with torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is):
        known = task.gradients(embeddings)
    return task.pull(embeddings, known, rows=slice(0, len(batch["position"])), share=1.0)


def task_without_memory(training: AnyTraining, dataset_info: DatasetInfo, grid: TokenGrid | None) -> Any:
    """The task of a training on the meta device: nothing is compiled or computed again, and there are no encoders."""
    changes = {"compile_network": False, "gradient_checkpointing": False}
    config: Any = training.replace(optimization=training.optimization.replace(**changes))
    match config:
        case AutoencoderTraining():
            return autoencoder_without_memory(config)
        case GANTraining():
            return GANTask(config, dataset_info=dataset_info, worker=META)
        case PriorTraining():
            return PriorTask(config, dataset_info=dataset_info, grid=known(grid), worker=META)
        case MaskedPriorTraining():
            return MaskedPriorTask(config, dataset_info=dataset_info, grid=known(grid), worker=META)
        case PixelTraining():
            return PixelTask(config, dataset_info=dataset_info, grid=grid, worker=META)
        case ContrastiveTraining():
            return ContrastiveTask(config, dataset_info=dataset_info, worker=META)
        case ClassifierTraining():
            return ClassifierTask(config, dataset_info=dataset_info, worker=META)
        case DiffusionPriorTraining():
            return DiffusionPriorTask(config, dataset_info=dataset_info, load_encoders=(), worker=META)
        case _:
            kind = DiffusionTask if config.degradation is None else ImageToImageTask
            return kind(config, dataset_info=dataset_info, worker=META)


def autoencoder_without_memory(config: AutoencoderTraining) -> AutoencoderTask:
    """Its perceptual network has shapes and no weights."""
    losses = config.losses.replace(perceptual_network="none")
    task = AutoencoderTask(config.replace(losses=losses), worker=META)
    with without_memory():
        task.perceptual = perceptual_loss(config)
    return task


def known(grid: TokenGrid | None) -> TokenGrid:
    assert grid is not None
    return grid


def batch_without_memory(
    training: AnyTraining, dataset_info: DatasetInfo, grid: TokenGrid | None, *, samples: int
) -> Batch:
    """All columns that the training can ask for; what the host reads is on the host."""
    data: Any = getattr(training, "data", None)
    host = {"position": torch.arange(samples), "task": torch.zeros(samples, dtype=torch.long)}
    with torch.device("meta"):
        batch = given_conditions(training, dataset_info, samples)
        batch |= {f"null_{name}": batch[name] for name in ("text_states", "text_embedding") if name in batch}
        batch |= {"label": torch.empty(samples, dtype=torch.long)}
        if grid is not None:
            batch["tokens"] = torch.empty(samples, grid.height * grid.width, dtype=torch.long)
        elif isinstance(training, DiffusionPriorTraining):
            batch["image_embedding"] = torch.empty(samples, dataset_info.image_embedding_dim)
        else:
            channels = getattr(data, "in_channels", 3)
            shape = samples, data.resolution, data.resolution
            batch["image"] = torch.empty(shape[0], channels, *shape[1:])
            batch["condition_image"] = torch.empty(shape[0], 3, *shape[1:])
        if isinstance(training, ContrastiveTraining):
            batch["text"] = torch.empty(samples, dataset_info.text_length, dtype=torch.long)
    return batch | host
