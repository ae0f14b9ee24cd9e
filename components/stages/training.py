"""What every stage that trains on pictures does: read them in order, train on them, keep some out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from components.data.degradations import Degradation
from components.data.held_out import held_out_arrays
from components.data.shards import Member, ShardIndex, check_member
from components.data.stream import training_stream
from components.stages.context import StageContext
from components.training.classifier_config import ClassifierConfig
from components.training.config import AutoencoderConfig, DiffusionConfig, GANConfig, PixelConfig
from components.training.contrastive_config import ContrastiveConfig, DiffusionPriorConfig
from components.training.launch import train
from components.training.loop import Task
from components.training.worker import RayStream

PictureConfig = (
    AutoencoderConfig
    | DiffusionConfig
    | GANConfig
    | PixelConfig
    | ContrastiveConfig
    | DiffusionPriorConfig
    | ClassifierConfig
)
HELD_OUT = 256  # pictures for previews and the final evaluation


def train_on_pictures(
    make_task: Callable[..., Task],
    config: PictureConfig,
    context: StageContext,
    index: ShardIndex,
    *,
    resolution: int | None = None,
    member: Member = "image",
    condition_member: Member | None = None,
    degradation: Degradation | None = None,
    **arguments: Any,
) -> Path:
    """Train the task `make_task(config, **arguments)` on the pictures of `index`.

    Args:
        resolution: of the pictures; None: that of `config`.
        member: what of each sample is its `image`.
        condition_member: what of each sample is its `condition_image`, where the task is given one.
        degradation: makes the `condition_image` of the `image` instead.

    Returns the folder of the final state, see `components.training.launch.train`, which raises TrainingError. Raises
    ShardError, before anything is started, for a set without the condition member.
    """
    if condition_member is not None:
        check_member(index, condition_member)
    resources = context.resources
    how: dict[str, Any] = {"resolution": resolution or config.resolution, "member": member}
    how |= {"condition_member": condition_member, "degradation": degradation}
    stream = partial(
        training_stream,
        index,
        **how,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        total_steps=config.total_steps,
        reader_cpus=resources.reader_cpus,
    )
    return train(
        partial(make_task, config, **arguments, max_batch_per_device=resources.max_batch_per_device),
        config=config,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=RayStream(stream),
        held_out=partial(held_out_arrays, index, **how, limit=HELD_OUT),
        recorder=context.recorder,
        resources=resources,
        scratch=context.scratch(),
    )
