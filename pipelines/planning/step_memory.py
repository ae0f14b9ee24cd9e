"""The memory that a GPU needs in a step of a training, and with which settings it has room for it."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import AnyTraining, GANTraining
from components.runtime.execution import Resources
from components.runtime.storage.connection import readable_bytes
from components.training.activations import Activations, UncountedError, activations
from components.training.memory import RESERVE
from components.training.sharding import why_whole
from components.training.sizes import DeviceBytes, device_bytes
from pipelines.planning.checkpoint_space import assumed_dataset_info, tokens_of
from pipelines.workflow import Stage

ROOM = 1 - RESERVE  # of a GPU's memory: what a training that finds its own batch leaves free, too


class StepMemory(NamedTuple):
    """Bytes on each GPU of a training."""

    held: int  # between activations: see `held_bytes`
    samples: int  # that a worker takes at a time
    sample: int | None = None  # of activations of each; None: they can't be counted
    activations: int | None = None  # of all of them, and of copies of the weights
    why: str = ""  # they can't

    @property
    def total(self) -> int | None:
        return None if self.activations is None else self.held + self.activations


class Setting(NamedTuple):
    """What of a training saves memory."""

    recompute: bool
    sharded: bool


def step_memory(stage: Stage, stages: Sequence[Stage], resources: Resources) -> StepMemory:
    """Of a training on the workers that it gets."""
    own = own_setting(stage, resources)
    held = sum(held_bytes(stage, stages, shards=resources.num_workers if own.sharded else 1))
    samples, kept = samples_at_a_time(stage, resources), kept_of(stage, stages)
    if isinstance(kept, str):
        return StepMemory(held, samples, why=kept)
    needed = kept.needed(recompute=own.recompute, sharded=own.sharded)
    return StepMemory(held, samples, needed.sample, needed.of(samples))


def held_bytes(stage: Stage, stages: Sequence[Stage], *, shards: int = 1) -> DeviceBytes:
    """What each GPU of a training holds between activations.

    Args:
        shards: workers that hold a part each; 1: each holds all.
    """
    assert isinstance(stage.config, AnyTraining)
    info, grid = assumed_dataset_info(stage, stages), tokens_of(stage, "tokens")
    return device_bytes(stage.config, info, grid=grid, shards=shards)


def samples_at_a_time(stage: Stage, resources: Resources) -> int:
    """A worker's share of the batch, or the parts of it that its profile asks for."""
    assert isinstance(stage.config, AnyTraining)
    share = stage.config.optimization.global_batch_size // resources.num_workers
    return min(share, resources.max_batch_per_device or share)


def own_setting(stage: Stage, resources: Resources) -> Setting:
    assert isinstance(stage.config, AnyTraining)
    sharded = resources.sharding == "full" and resources.num_workers > 1
    return Setting(stage.config.optimization.gradient_checkpointing, sharded)


def kept_of(stage: Stage, stages: Sequence[Stage]) -> Activations | str:
    """What its steps keep, or why that can't be counted."""
    assert isinstance(stage.config, AnyTraining)
    return counted_activations(stage.config, assumed_dataset_info(stage, stages), tokens_of(stage, "tokens"))


@cache
def counted_activations(config: AnyTraining, info: DatasetInfo, grid: TokenGrid | None) -> Activations | str:
    """Counted once, for a recipe's trainings are also those of others."""
    try:
        return activations(config, info, grid=grid)
    except UncountedError as error:
        return str(error)


def memory_warning(stage: Stage, stages: Sequence[Stage], resources: Resources, *, memory: float) -> str | None:
    """A line where a step does not fit into `memory` bytes of a GPU, with what to set; None where it fits, or where
    nobody knows."""
    step = step_memory(stage, stages, resources)
    needed = step.held if step.total is None else step.total
    if needed <= ROOM * memory:
        return None
    parts = readable_bytes(step.held)
    if step.activations is not None:
        parts += f" and {readable_bytes(step.activations)} for activations of {counted(step.samples)}"
    return (
        f"{stage.name} needs {readable_bytes(needed)} of each GPU ({parts}), more than {100 * ROOM:g} % of its "
        f"{readable_bytes(memory)}: {remedy(stage, stages, resources, room=ROOM * memory)}."
    )


def remedy(stage: Stage, stages: Sequence[Stage], resources: Resources, *, room: float) -> str:
    """The settings that change least and fit."""
    assert isinstance(stage.config, AnyTraining)
    own, samples, kept = own_setting(stage, resources), samples_at_a_time(stage, resources), kept_of(stage, stages)
    if isinstance(kept, str):
        return f"what its activations need is not counted ({kept})"
    for setting in settings(stage, resources):
        held = sum(held_bytes(stage, stages, shards=resources.num_workers if setting.sharded else 1))
        needed = kept.needed(recompute=setting.recompute, sharded=setting.sharded)
        most = int((room - held - needed.fixed) // max(1, needed.sample))
        if most >= 1:
            profile = [f"`max_batch_per_device: {most}`"] if most < samples else []
            profile += ["`sharding: full`"] if setting.sharded > own.sharded else []
            changes = [f"{' and '.join(profile)} in the profile"] if profile else []
            if setting.recompute > own.recompute:
                changes.append(f"`--set {stage.name}.gradient_checkpointing=true`")
            return f"{' with '.join(changes)} fits" + (PARTS_MATTER if most < samples and drops(stage) else "")
    return "no batch fits; take a GPU with more memory, or a smaller model"


PARTS_MATTER = ", but parts of a batch train another model (dropout and batch norm see one at a time)"


def drops(stage: Stage) -> bool:
    """Whether parts of a batch train another model than the whole of it."""
    return isinstance(stage.config, GANTraining) or getattr(getattr(stage.config, "network", None), "dropout", 0.0) > 0


def settings(stage: Stage, resources: Resources) -> Iterator[Setting]:
    """Those that the training has, and then those that cost more: recomputation time, shards traffic."""
    assert isinstance(stage.config, AnyTraining)
    own = own_setting(stage, resources)
    shards = resources.num_workers > 1 and why_whole(stage.config.network.kind) is None
    yield own
    if not isinstance(stage.config, GANTraining):
        yield own._replace(recompute=True)
    if shards:
        yield own._replace(sharded=True)
        yield Setting(recompute=True, sharded=True)


def counted(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples at a time"
