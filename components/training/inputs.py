"""Columns of a training's batches by frozen networks: made at each step, or arrays of an encoded set.

The stage that encodes a set (`components.stages.precompute`) names each array's model in the index.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from components.configuration.conditions import DatasetInfo
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
MEASURED = 256  # training images, to measure the deviation of latents


class ImageInputs(NamedTuple):
    """Columns of a training on images, and the facts of the data set that depend on them."""

    resolution: int  # of the images to read
    arrays: tuple[str, ...]  # of the set, read next to the images
    load_encoders: tuple[LoadEncoder, ...]  # of the frozen networks that make the other columns
    dataset_info: DatasetInfo
    settings: dict[str, float]  # for samplers, such as the scale of latents; stored with the model


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
    """Match the needs of a training with the arrays of the set and the frozen networks.

    Raises ValueError, in a line, for networks that are missing, do not fit, or did not make the set's arrays.
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
    """The encoders of `columns` that the set lacks, and the names of columns in the set.

    Raises ValueError, in a line, for encoders that are missing, do not fit, or did not make the set's arrays.
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
    """Raise ValueError if the set's array was made by another model than `maker`."""
    model, made_by = None if maker is None else maker.identity, index.array(name).made_by
    if model != made_by:
        raise ValueError(f"{name} of the set are by {made_by}, not by {model}: precompute them with this model")


def read_null(images: Artifact, index: ShardIndex, name: str) -> np.ndarray:
    """The null of an array of texts, for no text: float16 of the array's shape."""
    return parse_arrays([("", images.read(f"null_{name}.npy"))], index.array(name), f"null_{name}.npy")[0]


def array_sizes(index: ShardIndex, names: Sequence[str]) -> dict[str, int]:
    """Sizes of the set's arrays, as fields of `components.configuration.conditions.DatasetInfo`."""
    sizes = {}
    if "image_embedding" in names:
        (sizes["image_embedding_dim"],) = index.array("image_embedding").shape
    if "text_states" in names:
        sizes["text_states_length"], sizes["text_states_dim"] = index.array("text_states").shape
    return sizes


def latents_of(
    needs: TrainingNeeds, open_pool: Callable[[], Pool], index: ShardIndex, autoencoder: Artifact, *, seed: int
) -> tuple[LoadEncoder, float]:
    """The encoder of latents, and the scale for unit variance (Rombach et al., 2022, appendix G).

    The scale is one over the deviation of the latents of MEASURED training images. Raises ValueError if the recipe's
    sizes are not the autoencoder's.
    """
    shape = describe_autoencoder(autoencoder).diffused_shape
    sizes = (needs.channels, needs.resolution, needs.resolution)
    if shape != sizes:
        raise ValueError(f"latents are {shape} (channels, height, width), the recipe's in_channels and sides {sizes}")
    part = random_part(index, samples=MEASURED, seed=seed)
    with open_pool() as pool:
        scale = 1 / pool.call(partial(deviation_of_latents, part, autoencoder, samples=MEASURED))
    return partial(load_latents, autoencoder=autoencoder, scale=scale), scale


def deviation_of_latents(index: ShardIndex, autoencoder: Artifact, *, samples: int) -> float:
    """Standard deviation of the latents of the first training images. Runs in a worker.

    Latents are read from an encoded set, and otherwise made.
    """
    network, device = open_autoencoder(autoencoder), best_device()
    if "latents" in index.array_names:
        images = read_split(index, "train", resolution=network.grid[0], limit=samples, arrays=["latents"])
        return float(torch.from_numpy(images.arrays["latents"]).float().std())
    image = from_uint8(read_split(index, "train", resolution=network.resolution, limit=samples).image)
    network = network.to(device)
    batches = image.split(most_at_once(network.resolution))
    return float(torch.cat([network.to_latents(batch.to(device)).cpu() for batch in batches]).std())


def resolution_of_latents(index: ShardIndex, autoencoder: Artifact) -> int:
    """Side of the images to read: the autoencoder's, or the set's own next to latents.

    Raises ValueError if the set's latents are of another autoencoder.
    """
    if "latents" not in index.array_names:
        return describe_autoencoder(autoencoder).resolution
    check_maker(index, "latents", autoencoder)
    assert index.resolution is not None  # precompute decided it
    return index.resolution


def check_sizes(config: Training, sizes: dict[str, int]) -> None:
    """Raise ValueError if the recipe's size of a condition differs from the encoder's."""
    conditioning = getattr(config, "conditioning", None)
    for name, size in sizes.items():
        if getattr(conditioning, name, None) not in (None, size):
            raise ValueError(f"{name} is {getattr(conditioning, name)} in the recipe, but its encoder makes {size}")
