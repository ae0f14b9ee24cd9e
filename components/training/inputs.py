"""Columns of a training's batches that frozen networks make, or that the data set holds already.

The stage that precomputes them (`components.stages.precompute`) names in the set's index which model made each array.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from components.configuration.dataset_info import DatasetInfo
from components.configuration.optimization import Training, TrainingNeeds
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.held_out import random_part, read_split
from components.data.shards import ShardIndex, parse_arrays, read_bpe
from components.runtime.pool import Pool
from components.runtime.storage.artifact import Artifact
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once
from components.training.frozen import (
    Frozen,
    LoadEncoder,
    frozen_encoders,
    gray_images,
    load_latents,
    load_nulls,
    maker_of,
)

TEXTS = ("text_states", "text_embedding")
MEASURED = 256  # training images that the deviation of latents is measured on


class ImageInputs(NamedTuple):
    """Columns of a training on images, and what they say of the data set."""

    resolution: int  # of the images to read
    arrays: tuple[str, ...]  # of the set, read next to the images
    load_encoders: tuple[LoadEncoder, ...]  # of the frozen networks that make the other columns
    dataset_info: DatasetInfo
    settings: dict[str, float]  # what a sampler must know of them; stored with the model


def image_inputs(
    config: Training,
    open_pool: Callable[[], Pool],
    images: Artifact,
    index: ShardIndex,
    *,
    autoencoder: Artifact | None,
    contrastive: Artifact | None,
    text_encoder: Artifact | None,
) -> ImageInputs:
    """Match what a training needs with the arrays of its set and the networks that are given.

    Raises ValueError, in one line, for networks that are missing, do not fit, or are not those that made the arrays.
    """
    needs = config.needs()
    resolution = needs.resolution if autoencoder is None else resolution_of_latents(index, autoencoder)
    assert resolution is not None  # the training is one on images
    frozen, arrays = frozen_networks(
        needs.columns, images, index, resolution=resolution, contrastive=contrastive, text_encoder=text_encoder
    )
    check_sizes(config, frozen.sizes)
    load_encoders, settings = frozen.load_encoders, dict[str, float]()
    if autoencoder is not None:
        load, scale = latents_of(needs, open_pool, index, autoencoder, seed=config.optimization.seed)
        load_encoders, settings = (*load_encoders, load), {"latent_scale": scale}
        arrays = (*arrays, *({"latents"} & {*index.array_names}))
    elif needs.channels == 1:
        load_encoders = (*load_encoders, gray_images)
    dataset_info = DatasetInfo(
        num_classes=len(index.classes),
        vocab_size=index.text.vocab_size,
        text_length=index.text.text_length,
        **frozen.sizes,
    )
    return ImageInputs(resolution, arrays, load_encoders, dataset_info, settings)


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
    if not columns:
        return Frozen((), {}), ()
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


def latents_of(
    needs: TrainingNeeds, open_pool: Callable[[], Pool], index: ShardIndex, autoencoder: Artifact, *, seed: int
) -> tuple[LoadEncoder, float]:
    """The encoder of latents and its scale: one over the deviation of the latents of training images (Rombach et al.,
    2022, appendix G). Raises ValueError if the recipe's sizes are not theirs."""
    shape = describe_autoencoder(autoencoder).diffused_shape
    wanted = (needs.channels, needs.resolution, needs.resolution)
    if shape != wanted:
        raise ValueError(f"latents are {shape} (channels, height, width), the recipe's in_channels and sides {wanted}")
    part = random_part(index, samples=MEASURED, seed=seed)
    with open_pool() as pool:
        scale = 1 / pool.call(partial(deviation_of_latents, part, autoencoder, samples=MEASURED))
    return partial(load_latents, autoencoder=autoencoder, scale=scale), scale


def deviation_of_latents(index: ShardIndex, autoencoder: Artifact, *, samples: int) -> float:
    """Standard deviation of the latents of the first training images, read where the set has them. Runs in a worker."""
    network, device = open_autoencoder(autoencoder), best_device()
    if "latents" in index.array_names:
        made = read_split(index, "train", resolution=network.grid[0], limit=samples, arrays=["latents"])
        return float(torch.from_numpy(made.arrays["latents"]).float().std())
    image = from_uint8(read_split(index, "train", resolution=network.resolution, limit=samples).image)
    network = network.to(device)
    batches = image.split(most_at_once(network.resolution))
    return float(torch.cat([network.to_latents(batch.to(device)).cpu() for batch in batches]).std())


def resolution_of_latents(index: ShardIndex, autoencoder: Artifact) -> int:
    """Side of the images to read: what the autoencoder takes, or, next to latents, what the set keeps.

    Raises ValueError if the set's latents are of another autoencoder.
    """
    if "latents" not in index.array_names:
        return describe_autoencoder(autoencoder).resolution
    check_maker(index, "latents", autoencoder)
    assert index.resolution is not None  # precompute decided it
    return index.resolution


def check_sizes(config: Training, sizes: dict[str, int]) -> None:
    """Raise ValueError if the recipe says another size of a condition than its encoder makes."""
    conditioning = getattr(config, "conditioning", None)
    for name, size in sizes.items():
        if getattr(conditioning, name, None) not in (None, size):
            raise ValueError(f"{name} is {getattr(conditioning, name)} in the recipe, but its encoder makes {size}")
