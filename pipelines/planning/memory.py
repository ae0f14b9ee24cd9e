"""Bytes of a training on each GPU, in checkpoints and in the finished model; fitting settings.

All of them are read off one model of the step (`components.training.step_model`), which is built once a training.
"""

from functools import cache
from typing import NamedTuple

import torch
from rich import filesize
from torch import nn

from components.configuration.conditions import IMAGES, DatasetInfo, TokenGrid
from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.configuration.usage import usage_errors
from components.models.layers import blocks_of
from components.runtime.execution import Resources
from components.stages.images import ImagesConfig
from components.training.activations import Linear, activations
from components.training.memory import RESERVE
from components.training.optim import muon_parameters
from components.training.step_model import StepModel
from pipelines.workflow import Stage

MOMENTS = 2  # numbers that AdamW keeps for each that it trains, in fp32; Muon keeps one
MANY_CLASSES = 1000  # of a set that nobody has counted yet; each is a row of an embedding
FROZEN_DIM, FROZEN_LENGTH = 1024, 77  # of a pretrained encoder that nobody has loaded yet
ROOM = 1 - RESERVE  # of a GPU's memory, for a training that finds its own batch too
PARTS_MATTER = ", but parts of a batch train another model (dropout and batch norm see one at a time)"


@cache
def step_model(training: Training, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> StepModel:
    """Build the model of a training's step once, for recipes that share trainings."""
    return StepModel(training, dataset_info, grid=grid)


def model_of(stage: Stage, *, classes: int = MANY_CLASSES) -> StepModel:
    """Build the model of a stage's step, for a set with so many classes.
    Raises UsageError for a training that no such network takes."""
    assert isinstance(stage.config, Training)
    info = assumed_dataset_info(stage, classes=classes)
    with usage_errors(f"{stage.name}: "):
        return step_model(stage.config, info, tokens_of(stage, "tokens"))


def tokens_of(stage: Stage, name: str) -> TokenGrid | None:
    """The token grid of a stage's input by name; None for an input without tokens."""
    tokens = stage.inputs.get(name)
    tokenizer = tokens.inputs.get("tokenizer") if isinstance(tokens, Stage) else None
    config = tokenizer.config if isinstance(tokenizer, Stage) else None
    return config.token_grid if isinstance(config, Training) else None


def images_of(stage: Stage) -> ImagesConfig:
    """Configuration of the images that a stage learns from or goes through."""
    return next(before.config for before in stage.upstream if isinstance(before.config, ImagesConfig))


def assumed_dataset_info(stage: Stage, *, classes: int = MANY_CLASSES) -> DatasetInfo:
    """The conditions of the set as far as the recipe decides; an upper bound for other conditions."""
    images = images_of(stage)
    trainings = [before.config for before in stage.upstream if isinstance(before.config, Training)]
    sizes = next((training.encoded_sizes for training in trainings if training.encoded_sizes), None)
    return DatasetInfo(
        num_classes=classes,
        vocab_size=images.vocab_size,
        text_length=images.text_length,
        condition=tokens_of(stage, "condition"),
        text_states_length=FROZEN_LENGTH if sizes is None else images.text_length,
        **(sizes or {"image_embedding_dim": FROZEN_DIM, "text_states_dim": FROZEN_DIM}),
    )


class DeviceBytes(NamedTuple):
    """Bytes on each device of a training between activations."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int  # of shards, what is whole for a moment: see `device_bytes`


@cache
def device_bytes(model: StepModel, *, shards: int = 1) -> DeviceBytes:
    """Count the bytes on each device, of `shards` that hold a part each, cut along the first dimension.
    Gathered are, while a block goes backward, its weights and gradients and the weights of the block that comes next,
    and weights and gradients of what belongs to no block."""
    networks = [learner.network for learner in model.learners]
    averages = [network for learner in model.learners if learner.ema for network in learner.ema.averages.values()]
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    gradients = sum(part_bytes(parameter, shards) for parameter in trained)
    by_muon = [p for network in networks for p in muon_parameters(network, model.training.optimization)]
    blocks = [network_bytes(block) for block in blocks_of(model.network).values()]
    outside = network_bytes(model.network) - sum(blocks)
    return DeviceBytes(
        weights=sum(network_bytes(network, shards) for network in networks),
        gradients=gradients,
        optimizer=MOMENTS * gradients - sum(part_bytes(parameter, shards) for parameter in by_muon),
        averages=sum(network_bytes(network, shards) for network in averages),
        gathered=0 if shards == 1 else 2 * outside + 3 * max(blocks, default=0),
    )


def network_bytes(network: nn.Module, shards: int = 1) -> int:
    """Bytes of a device's share of a network's tensors; buffers are whole on each."""
    parameters = {name for name, _ in network.named_parameters()}
    tensors = network.state_dict()
    return sum(part_bytes(tensor, shards if name in parameters else 1) for name, tensor in tensors.items())


def part_bytes(tensor: torch.Tensor, shards: int) -> int:
    """Bytes of a tensor's largest part after a cut along the first dimension into `shards` parts."""
    rows = len(tensor) if tensor.ndim else 1
    return tensor.numel() // max(1, rows) * -(-rows // shards) * tensor.element_size()


def checkpoint_bytes(model: StepModel) -> int:
    """Bytes of a checkpoint: weights, averages and optimizers."""
    whole = device_bytes(model)
    return whole.weights + whole.optimizer + whole.averages


def model_bytes(model: StepModel) -> int:
    """Bytes of the finished model, with the snapshots of a power EMA."""
    config = model.training.optimization
    has_snapshots = config.ema_decay > 0 and config.ema == "power"
    scheduled = -(-config.total_steps // config.checkpoint_every)  # see `is_scheduled`
    return network_bytes(model.network) * (1 + 2 * has_snapshots * scheduled)


counted_activations = cache(activations)  # of a step, counted once


class Setting(NamedTuple):
    """Settings of a training that save memory: activations recomputed, weights sharded."""

    recompute: bool
    sharded: bool


class StepMemory(NamedTuple):
    """Bytes on each GPU of a training."""

    held: int  # between activations: see `device_bytes`
    samples: int  # that a worker takes at a time
    needed: Linear  # for activations, and copies of the weights

    @property
    def activations(self) -> int:
        return self.needed.of(self.samples)

    @property
    def total(self) -> int:
        return self.held + self.activations

    def fitting(self, memory: float) -> int:
        """Most of the samples that fit a GPU of `memory` bytes; 0 where not even one does."""
        room = ROOM * memory - self.held - self.needed.fixed
        return max(0, min(self.samples, int(room // max(1, self.needed.sample))))


def step_memory(model: StepModel, resources: Resources, *, setting: Setting | None = None) -> StepMemory:
    """Memory of a training on the training's workers, under a setting; None: that of recipe and profile."""
    own = setting or own_setting(model, resources)
    share = model.training.optimization.global_batch_size // resources.num_workers
    parts = resources.num_workers if resources.sharding == "none" else resources.shards(resources.num_workers)
    held = sum(device_bytes(model, shards=parts if own.sharded else 1))
    needed = counted_activations(model).needed(recompute=own.recompute, sharded=own.sharded)
    return StepMemory(held, min(share, resources.max_batch_per_device or share), needed)


def memory_warning(stage: Stage, resources: Resources, *, memory: float) -> str | None:
    """A warning where a step needs more than `memory` bytes of a GPU, with settings; None otherwise."""
    step = step_memory(model_of(stage), resources)
    limit = f"{100 * ROOM:g} % of its {filesize.decimal(int(memory))}"
    if step.total <= ROOM * memory:
        return None
    total, held, kept = map(filesize.decimal, (step.total, step.held, step.activations))
    samples = "1 sample" if step.samples == 1 else f"{step.samples} samples at a time"
    needs = f"{total} of each GPU ({held} and {kept} for activations of {samples})"
    return f"{stage.name} needs {needs}, more than {limit}: {remedy(stage, resources, memory=memory)}."


def remedy(stage: Stage, resources: Resources, *, memory: float) -> str:
    """The least changing settings that fit a GPU of `memory` bytes."""
    model = model_of(stage)
    own = own_setting(model, resources)
    dearer = [own._replace(recompute=True)] if model.training.optimization.can_recompute else []  # in time
    if resources.num_workers > 1 and family_of(model.training.network.kind).whole is None:  # in traffic
        dearer += [own._replace(sharded=True), Setting(recompute=True, sharded=True)]
    for setting in (own, *dearer):
        step = step_memory(model, resources, setting=setting)
        most = step.fitting(memory)
        if most >= 1:
            profile = [f"`max_batch_per_device: {most}`"] if most < step.samples else []
            profile += ["`sharding: full`"] if setting.sharded > own.sharded else []
            changes = [f"{' and '.join(profile)} in the profile"] if profile else []
            if setting.recompute > own.recompute:
                changes.append(f"`--set {stage.name}.gradient_checkpointing=true`")
            warning = PARTS_MATTER if most < step.samples and model.task.parts_matter else ""
            return f"{' with '.join(changes)} fits{warning}"
    return "no batch fits; take a GPU with more memory, or a smaller model"


def own_setting(model: StepModel, resources: Resources) -> Setting:
    """The setting of recipe and profile."""
    sharded = resources.shards(resources.num_workers) > 1
    return Setting(model.training.optimization.gradient_checkpointing, sharded)
