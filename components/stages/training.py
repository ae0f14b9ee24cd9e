"""What every stage that trains on images does: read them in order, train on them, keep some out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from components.configuration.diffusion import DiffusionTraining
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    PixelTraining,
)
from components.data.arrays import parse_arrays
from components.data.degradations import Degradation
from components.data.held_out import held_out_arrays
from components.data.shards import Member, ShardIndex, check_member, read_bpe
from components.data.stream import training_stream
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.training.building import IMAGES
from components.training.flops import step_flops
from components.training.frozen import Frozen, LoadEncoder, frozen_encoders, load_nulls, maker_of
from components.training.launch import train
from components.training.loop import Task
from components.training.results import ModelDescription
from components.training.worker import RayStream

ImageConfig = (
    AutoencoderTraining
    | DiffusionTraining
    | GANTraining
    | PixelTraining
    | ContrastiveTraining
    | DiffusionPriorTraining
    | ClassifierTraining
)
TEXTS = ("text_states", "text_embedding")
HELD_OUT = 256  # images for previews and the final evaluation


def train_on_images(
    make_task: Callable[..., Task],
    config: ImageConfig,
    context: StageContext,
    index: ShardIndex,
    *,
    resolution: int | None = None,
    model: ModelDescription,
    member: Member = "image",
    condition_member: Member | None = None,
    degradation: Degradation | None = None,
    arrays: Sequence[str] = (),
    **arguments: Any,
) -> Artifact:
    """Train the task `make_task(config, **arguments)` on the images of `index`.

    Args:
        resolution: of the images; None: that of `config`.
        model: what describes the model next to its weights.
        member: what of each sample is its `image`.
        condition_member: what of each sample is its `condition_image`, where the task is given one.
        degradation: makes the `condition_image` of the `image` instead.
        arrays: names of arrays of the set that the task is given too.

    Returns the committed model artifact: bundle, metrics and preview. Raises as `components.training.launch.train`, and
    ShardError, before anything is started, for a set without the condition member.
    """
    if condition_member is not None:
        check_member(index, condition_member)
    resources = context.resources
    wanted: dict[str, Any] = {  # of each sample, in training and of what is held out
        "resolution": resolution or config.data.resolution,
        "member": member,
        "condition_member": condition_member,
        "degradation": degradation,
        "arrays": tuple(arrays),
    }
    stream = partial(
        training_stream,
        index,
        **wanted,
        global_batch_size=config.optimization.global_batch_size,
        seed=config.optimization.seed,
        total_steps=config.optimization.total_steps,
        reader_cpus=resources.reader_cpus,
        readers=resources.readers,
    )
    trained = train(
        partial(make_task, config, **arguments),
        config=config.optimization,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=RayStream(stream),
        held_out=partial(held_out_arrays, index, **wanted, limit=HELD_OUT),
        recorder=context.recorder,
        resources=resources,
        store=context.store,
        model=model,
        step_flops=partial(step_flops, config, arguments.get("dataset_info", IMAGES)),
    )
    return context.commit("model", entries=trained.entries, metadata={"summary": trained.summary})


def frozen_networks(
    columns: Sequence[str],
    images: Artifact,
    index: ShardIndex,
    *,
    resolution: int,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> tuple[Frozen, tuple[str, ...]]:
    """The encoders of those of `columns` that the set does not hold already, and the names of those that it holds.

    Raises ValueError, in one line, for encoders that are missing or do not fit, or others than made the set's arrays.
    """
    stored = tuple(name for name in columns if name in index.array_names)
    for name in stored:
        check_maker(index, name, maker_of(name, contrastive=contrastive, text_encoder=text_encoder))
    frozen = frozen_encoders(
        [name for name in columns if name not in stored],
        resolution=resolution,
        bpe=read_bpe(index),
        contrastive=contrastive,
        text_encoder=text_encoder,
    )
    nulls = {f"null_{name}": read_null(images, index, name) for name in stored if name in TEXTS}
    loaders: tuple[LoadEncoder, ...] = (partial(load_nulls, nulls=nulls),) if nulls else ()
    return Frozen((*frozen.load_encoders, *loaders), frozen.sizes | array_sizes(index, stored)), stored


def check_maker(index: ShardIndex, name: str, maker: Artifact | None) -> None:
    """Raise ValueError if the set's array is the work of another model than the one given."""
    wanted, made_by = None if maker is None else maker.identity, index.array(name).made_by
    if wanted != made_by:
        raise ValueError(f"{name} of the set are by {made_by}, not by {wanted}: precompute them with this model")


def read_null(images: Artifact, index: ShardIndex, name: str) -> np.ndarray:
    """What stands for no text in the set's array `name`, which is of texts: float16 of an array's shape."""
    return parse_arrays([("", images.read(f"null_{name}.npy"))], index.array(name), f"null_{name}.npy")[0]


def array_sizes(index: ShardIndex, names: Sequence[str]) -> dict[str, int]:
    """Fields of `components.configuration.dataset_info.DatasetInfo` that the set's arrays decide."""
    sizes = {}
    if "image_embedding" in names:
        (sizes["image_embedding_dim"],) = index.array("image_embedding").shape
    if "text_states" in names:
        sizes["text_states_length"], sizes["text_states_dim"] = index.array("text_states").shape
    return sizes
