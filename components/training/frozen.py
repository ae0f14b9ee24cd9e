"""Frozen encoders: trained networks that add columns to the batches of another training.

The contrastive encoder adds the columns of DALL-E 2's prior and decoder, a text encoder the condition of Imagen.
Columns may have been made before, and then come with the images: the stage that encodes a set
(`components.stages.precompute`) names each array's model in the index.

Shapes: B batch, E embedding_dim, L text length, D features of a text's state."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from components.configuration.conditions import DatasetInfo
from components.configuration.optimization import Training
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.held_out import random_part, read_split
from components.data.shards import ShardIndex, View, parse_arrays, read_bpe
from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION
from components.models.contrastive import ContrastiveEncoder, unit_variance
from components.models.diffusion.corruption import downsample
from components.runtime.pool import Pool
from components.runtime.storage.artifact import Artifact
from components.sampling.device import best_device
from components.sampling.frozen_text import BPE, ContrastiveText, FrozenText, contrastive_text, load_frozen_text
from components.sampling.images import from_uint8, one_channel
from components.sampling.model import most_at_once
from components.training.batches import to_batch, with_positions
from components.training.loop import Arrays, Batch

Encoder = Callable[[Batch], Batch]  # a batch -> the columns that a frozen network adds or replaces
LoadEncoder = Callable[[torch.device], Encoder]  # picklable: called in every worker
TEXTS = ("text_states", "text_embedding")
MEASURED = 256  # training images, to measure the deviation of latents


class FrozenNetworks(NamedTuple):
    """Trained networks that make columns for another training."""

    autoencoder: Artifact | None = None
    contrastive: Artifact | None = None
    text_encoder: Artifact | None = None

    def maker_of(self, column: str) -> Artifact | None:
        """The network that makes `column`, or None."""
        if column == "latents":
            return self.autoencoder
        return self.contrastive if column == "image_embedding" else self.text_encoder or self.contrastive


class Frozen(NamedTuple):
    """The frozen encoders of a training."""

    load_encoders: tuple[LoadEncoder, ...]
    sizes: dict[str, int]  # fields of `components.configuration.conditions.DatasetInfo`


class ImageInputs(NamedTuple):
    """Columns of a training on images, and the facts of the data set that depend on them."""

    view: View  # of the set: images and stored arrays
    load_encoders: tuple[LoadEncoder, ...]  # of the frozen networks that make the other columns
    dataset_info: DatasetInfo
    settings: dict[str, float]  # for samplers, such as the scale of latents; stored with the model


@torch.no_grad()
def encoded(batch: Batch, encoders: Iterable[Encoder]) -> Batch:
    """The batch with the columns of all encoders; each encoder sees the columns of earlier ones.
    A column called `null_text_states` is the null of `text_states`, and so on."""
    for encoder in encoders:
        batch = {**batch, **encoder(batch)}
    return batch


def image_encoder(network: ContrastiveEncoder) -> Encoder:
    """Adds `image_embedding` (B, E) of `image`, reduced to the encoder's resolution, of unit variance."""

    def encode(batch: Batch) -> Batch:
        image = batch["image"]
        small = image if image.shape[2] == network.resolution else downsample(image, network.resolution)
        return {"image_embedding": unit_variance(network.encode_image(small))}

    return encode


class Latents:
    """Replaces `image` by latents (B, C, h, w) times `scale`, for unit variance (Rombach et al., 2022)."""

    def __init__(self, network: Autoencoder, scale: float) -> None:
        self.network, self.scale = network, scale

    def __call__(self, batch: Batch) -> Batch:
        latents = batch["latents"] if "latents" in batch else self.network.to_latents(batch["image"])
        return {"image": self.scale * latents}

    def images(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to images (B, 3, H, W), near [-1, 1]."""
        return self.network.from_latents(latents / self.scale)


def gray_images(device: torch.device) -> Encoder:
    """Replaces gray `image` by a single channel, (B, 1, H, W); the encoder raises ColorError for a color."""
    del device
    return lambda batch: {"image": one_channel(batch["image"])}


def text_encoder(text: ContrastiveText) -> Encoder:
    """Adds `text_states` (B, L, D) and `text_embedding` (B, E) of `text`, in the encoder's own ids."""
    nothing = {f"null_{name}": value for name, value in text.conditions([""]).items()}
    return lambda batch: {**text.encode_ids(batch["text"]), **repeated(nothing, batch)}


def caption_encoder(text: FrozenText, bpe: Tokenizer) -> Encoder:
    """Adds `text_states` (B, L, D) of captions, by an encoder with a tokenizer of its own.
    A byte-level BPE gives back the caption of the ids in `text`, in lower case and cut where it was too long."""
    nothing = {"null_text_states": text.encode([""])}

    def encode(batch: Batch) -> Batch:
        captions = [caption.strip() for caption in bpe.decode_batch(batch["text"].tolist())]
        return {"text_states": text.encode(captions), **repeated(nothing, batch)}

    return encode


def repeated(nothing: dict[str, Tensor], batch: Batch) -> Batch:
    """Expands columns of a single row to the samples of a batch."""
    return {name: row.expand(len(batch["position"]), *row.shape[1:]) for name, row in nothing.items()}


def frozen_encoders(columns: Sequence[str], networks: FrozenNetworks, *, resolution: int, bpe: str) -> Frozen:
    """The encoders of all `columns`, latents not scaled; `bpe` is the text of the data's tokenizer.
    Raises ValueError, in a line, for a needed network that is missing or does not fit."""
    loaders, sizes = list[LoadEncoder](), dict[str, int]()
    if {"image_embedding", "text_embedding"} & {*columns}:
        if networks.contrastive is None:
            raise ValueError("image_embedding and text_embedding need a contrastive model")
        sizes["image_embedding_dim"] = embedding_dim_of(networks.contrastive, resolution=resolution, bpe=bpe)
        loaders.append(partial(load_image_encoder, contrastive=networks.contrastive))
    if {*TEXTS} & {*columns}:
        encoder = networks.maker_of("text_states")
        if encoder is None:
            raise ValueError("text_states need a contrastive model or a pretrained text encoder")
        if DESCRIPTION in encoder.names():
            text = json.loads(encoder.read(DESCRIPTION))["network"]["text"]
            sizes |= {"text_states_length": text["context_length"], "text_states_dim": text["model_dim"]}
        else:
            sizes |= {name: encoder.metadata[name] for name in ("text_states_length", "text_states_dim")}
        loaders.append(partial(load_text_encoder, encoder=encoder, bpe=bpe))
    if "latents" in columns:
        if networks.autoencoder is None:
            raise ValueError("latents among the columns need an autoencoder")
        loaders.append(partial(load_latent_columns, autoencoder=networks.autoencoder))
    return Frozen(tuple(loaders), sizes)


def embedding_dim_of(contrastive: Artifact, *, resolution: int, bpe: str) -> int:
    """Size of a contrastive encoder's embeddings.
    Raises ValueError for another kind of model, for smaller images than the encoder's, or another text tokenizer."""
    description = json.loads(contrastive.read(DESCRIPTION))
    kind, network = description["kind"], description["network"]
    if kind != "contrastive":
        raise ValueError(f"image_embedding needs a contrastive model, not one of kind {kind}")
    if network["resolution"] > resolution:
        raise ValueError(f"the contrastive encoder sees images of {network['resolution']} pixels, not of {resolution}")
    if contrastive.read(BPE).decode() != bpe:
        raise ValueError("the contrastive encoder has the text tokenizer of another set; train it on this one")
    return network["embedding_dim"]


def load_latents(device: torch.device, *, autoencoder: Artifact, scale: float) -> Latents:
    """`Latents` of a model of the autoencoder stage, as the last encoder: others need the image."""
    return Latents(open_autoencoder(autoencoder).to(device), scale)


def load_latent_columns(device: torch.device, *, autoencoder: Artifact) -> Encoder:
    """Adds `latents` (B, C, h, w), not scaled."""
    network = open_autoencoder(autoencoder).to(device)
    return lambda batch: {"latents": network.to_latents(batch["image"])}


def load_nulls(device: torch.device, *, nulls: dict[str, np.ndarray]) -> Encoder:
    """Adds `null_text_states` and `null_text_embedding` to columns of an encoded set."""
    rows = {name: torch.from_numpy(null).to(device).float()[None] for name, null in nulls.items()}
    return lambda batch: repeated(rows, batch)


class ColumnEncoder:
    """Encodes rows to float32 arrays, for an encoded set: `columns` and their nulls."""

    def __init__(self, load_encoders: Sequence[LoadEncoder], columns: Sequence[str]) -> None:
        self.device = best_device()
        self.encoders = [load(self.device) for load in load_encoders]
        self.names = {*columns, *(f"null_{name}" for name in columns)}

    def __call__(self, rows: Arrays) -> Arrays:
        batch = encoded(with_positions(to_batch(rows, self.device)), self.encoders)
        return {name: batch[name].float().cpu().numpy() for name in self.names & batch.keys()}


def load_image_encoder(device: torch.device, *, contrastive: Artifact) -> Encoder:
    """`image_encoder` of a model of the contrastive stage."""
    with contrastive.local_copy() as folder:
        return image_encoder(contrastive_text(folder, device=device).network)


def load_text_encoder(device: torch.device, *, encoder: Artifact, bpe: str) -> Encoder:
    """`text_encoder` of a contrastive model with the tokenizer `bpe`, else `caption_encoder`."""
    with encoder.local_copy() as folder:
        text = load_frozen_text(folder, device=device)
        own = (folder / BPE).is_file() and (folder / BPE).read_text() == bpe
    return (
        text_encoder(text)
        if own and isinstance(text, ContrastiveText)
        else caption_encoder(text, Tokenizer.from_str(bpe))
    )


def image_inputs(
    config: Training,
    open_pool: Callable[[], Pool],
    images: Artifact,
    index: ShardIndex,
    networks: FrozenNetworks,
    *,
    latent_scale: float | None = None,
) -> ImageInputs:
    """Match the needs of a training with the arrays of the set and the frozen networks.
    `latent_scale`: that weights to start from have learned; None: it is measured. Raises as `frozen_networks`."""
    needs, autoencoder = config.needs(), networks.autoencoder
    resolution = needs.resolution
    if autoencoder is not None and "latents" not in index.array_names:
        resolution = describe_autoencoder(autoencoder).resolution
    elif autoencoder is not None:
        check_maker(index, "latents", autoencoder)
        resolution = index.resolution  # precompute decided it
    assert resolution is not None  # the training is one on images
    frozen, arrays = frozen_networks(needs.columns, images, index, networks, resolution=resolution)
    check_sizes(config, frozen.sizes)
    load_encoders, settings = frozen.load_encoders, dict[str, float]()
    if autoencoder is not None:
        scale = scale_of_latents(config, open_pool, index, autoencoder, scale=latent_scale)
        load = partial(load_latents, autoencoder=autoencoder, scale=scale)
        load_encoders, settings = (*load_encoders, load), {"latent_scale": scale}
        arrays = (*arrays, *({"latents"} & {*index.array_names}))
    elif needs.channels == 1:
        load_encoders = (*load_encoders, gray_images)
    text = {"vocab_size": index.text.vocab_size, "text_length": index.text.text_length}
    dataset_info = DatasetInfo(num_classes=len(index.classes), **text, **frozen.sizes)
    view = View(resolution, needs.member, needs.condition_member, arrays)
    return ImageInputs(view, load_encoders, dataset_info, settings)


def frozen_networks(
    columns: Sequence[str], images: Artifact, index: ShardIndex, networks: FrozenNetworks, *, resolution: int
) -> tuple[Frozen, tuple[str, ...]]:
    """The encoders of `columns` that the set lacks, and the names of columns in the set.
    Raises ValueError, in a line, for encoders that are missing, do not fit, or did not make the set's arrays."""
    if not columns:
        return Frozen((), {}), ()
    stored = tuple(name for name in columns if name in index.array_names)
    for name in stored:
        check_maker(index, name, networks.maker_of(name))
    made = [name for name in columns if name not in stored]
    frozen = frozen_encoders(made, networks, resolution=resolution, bpe=read_bpe(index))
    nulls, sizes = {}, dict(frozen.sizes)
    for name in stored:
        info, file = index.array(name), f"null_{name}.npy"
        if name in TEXTS:  # the null is for no text: float16 of the array's shape
            nulls[f"null_{name}"] = parse_arrays([("", images.read(file))], info, file)[0]
        if name == "image_embedding":
            (sizes["image_embedding_dim"],) = info.shape
        if name == "text_states":
            sizes["text_states_length"], sizes["text_states_dim"] = info.shape
    loaders: tuple[LoadEncoder, ...] = (partial(load_nulls, nulls=nulls),) if nulls else ()
    return Frozen((*frozen.load_encoders, *loaders), sizes), stored


def check_maker(index: ShardIndex, name: str, maker: Artifact | None) -> None:
    """Raise ValueError if the set's array was made by another model than `maker`."""
    model, made_by = None if maker is None else maker.identity, index.array(name).made_by
    if model != made_by:
        raise ValueError(f"{name} of the set are by {made_by}, not by {model}: precompute them with this model")


def scale_of_latents(
    config: Training, open_pool: Callable[[], Pool], index: ShardIndex, autoencoder: Artifact, *, scale: float | None
) -> float:
    """The scale of latents for unit variance (Rombach et al., 2022), measured if not given.
    Raises ValueError if the recipe's sizes are not the autoencoder's."""
    needs, shape = config.needs(), describe_autoencoder(autoencoder).diffused_shape
    sizes = (needs.channels, needs.resolution, needs.resolution)
    if shape != sizes:
        raise ValueError(f"latents are {shape} (channels, height, width), the recipe's in_channels and sides {sizes}")
    if scale is not None:
        return scale
    part = random_part(index, samples=MEASURED, seed=config.optimization.seed)
    with open_pool() as pool:
        return 1 / pool.call(partial(deviation_of_latents, part, autoencoder, samples=MEASURED))


def deviation_of_latents(index: ShardIndex, autoencoder: Artifact, *, samples: int) -> float:
    """Standard deviation of the latents, read or made, of the first training images. Runs in a worker."""
    network, device = open_autoencoder(autoencoder), best_device()
    if "latents" in index.array_names:
        images = read_split(index, "train", View(network.grid[0], arrays=("latents",)), limit=samples)
        return float(torch.from_numpy(images.arrays["latents"]).float().std())
    image = from_uint8(read_split(index, "train", View(network.resolution), limit=samples).image)
    network = network.to(device)
    batches = image.split(most_at_once(network.resolution))
    return float(torch.cat([network.to_latents(batch.to(device)).cpu() for batch in batches]).std())


def check_sizes(config: Training, sizes: dict[str, int]) -> None:
    """Raise ValueError if the recipe's size of a condition differs from the encoder's."""
    conditioning = getattr(config, "conditioning", None)
    for name, size in sizes.items():
        if getattr(conditioning, name, None) not in (None, size):
            raise ValueError(f"{name} is {getattr(conditioning, name)} in the recipe, but its encoder makes {size}")
