"""Frozen encoders: trained networks that add columns to the batches of another training.

The contrastive encoder adds the columns of DALL-E 2's prior and decoder, a text encoder the condition of Imagen. Each
is loaded in every worker, from an artifact, and changes no more. Columns may have been made before, and then come with
the images (`components.stages.precompute`).

Shapes: B batch, E embedding_dim, L text length, D features of a text's state.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from components.data.encoding import open_autoencoder
from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION
from components.models.contrastive import ContrastiveEncoder, unit_variance
from components.models.diffusion.corruption import downsample
from components.runtime.storage.artifact import Artifact
from components.sampling.device import best_device
from components.sampling.frozen_text import (
    BPE,
    ContrastiveText,
    FrozenText,
    contrastive_text,
    load_frozen_text,
)
from components.sampling.images import one_channel
from components.sampling.text_encoding import parse_bpe
from components.training.batches import to_batch, with_positions
from components.training.loop import Arrays, Batch

Encoder = Callable[[Batch], Batch]  # a batch -> the columns that a frozen network adds or replaces
LoadEncoder = Callable[[torch.device], Encoder]  # picklable: called in every worker


class Frozen(NamedTuple):
    """The frozen encoders of a training."""

    load_encoders: tuple[LoadEncoder, ...]
    sizes: dict[str, int]  # fields of `components.configuration.conditions.DatasetInfo`


@torch.no_grad()
def encoded(batch: Batch, encoders: Iterable[Encoder]) -> Batch:
    """The batch with the columns of all encoders; each encoder sees the columns of earlier ones.

    A column called `null_text_states` is the null of `text_states`, and so on; see `components.training.conditioning`.
    """
    for encoder in encoders:
        batch = {**batch, **encoder(batch)}
    return batch


def image_encoder(network: ContrastiveEncoder) -> Encoder:
    """Adds `image_embedding` (B, E) of `image`, with components of unit variance.

    Larger images are reduced to the encoder's resolution.
    """

    def encode(batch: Batch) -> Batch:
        image = batch["image"]
        small = image if image.shape[2] == network.resolution else downsample(image, network.resolution)
        return {"image_embedding": unit_variance(network.encode_image(small))}

    return encode


class Latents:
    """Replaces `image` by latents (B, C, h, w) times `scale`, for unit variance, and decodes latents.

    Rombach et al. (2022), appendix G.
    """

    def __init__(self, network: Autoencoder, scale: float) -> None:
        self.network, self.scale = network, scale

    def __call__(self, batch: Batch) -> Batch:
        latents = batch["latents"] if "latents" in batch else self.network.to_latents(batch["image"])
        return {"image": self.scale * latents}

    def images(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to images (B, 3, H, W), near [-1, 1]."""
        return self.network.from_latents(latents / self.scale)


def gray_images(device: torch.device) -> Encoder:
    """Replaces `image`, gray in three equal channels, by a single channel, (B, 1, H, W).

    The encoder raises ColorError for an image in color.
    """
    del device
    return lambda batch: {"image": one_channel(batch["image"])}


def text_encoder(text: ContrastiveText) -> Encoder:
    """Adds `text_states` (B, L, D) and `text_embedding` (B, E) of `text`, in the encoder's own ids."""
    empty = text.encode([""])
    nothing = {"null_text_states": empty.states, "null_text_embedding": empty.embedding}

    def encode(batch: Batch) -> Batch:
        features = text.encode_ids(batch["text"])
        return {"text_states": features.states, "text_embedding": features.embedding, **repeated(nothing, batch)}

    return encode


def caption_encoder(text: FrozenText, bpe: Tokenizer) -> Encoder:
    """Adds `text_states` (B, L, D) of captions, by an encoder with a tokenizer of its own.

    Captions are decoded from the ids of `bpe` in column `text`: a byte-level BPE gives the caption back, in lower case
    and cut where it was too long.
    """
    nothing = {"null_text_states": text.encode([""]).states}

    def encode(batch: Batch) -> Batch:
        captions = [caption.strip() for caption in bpe.decode_batch(batch["text"].tolist())]
        return {"text_states": text.encode(captions).states, **repeated(nothing, batch)}

    return encode


def repeated(nothing: dict[str, Tensor], batch: Batch) -> Batch:
    """Expands columns of a single row to the samples of a batch."""
    return {name: row.expand(len(batch["position"]), *row.shape[1:]) for name, row in nothing.items()}


def frozen_encoders(
    columns: Sequence[str],
    *,
    resolution: int,
    bpe: str,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> Frozen:
    """The encoders of all `columns` among image_embedding, text_states and text_embedding.

    Args:
        resolution: of the training's images.
        bpe: the tokenizer of the data's captions, the text of its file.
        contrastive: a model of the contrastive stage; makes all three.
        text_encoder: a model of the text_encoder stage; makes the text_states in the contrastive model's place.

    Raises ValueError, in a line, for a needed encoder that is missing or does not fit.
    """
    loaders: list[LoadEncoder] = []
    sizes: dict[str, int] = {}
    if contrastive is not None and {"image_embedding", "text_embedding"} & {*columns}:
        network = contrastive_arguments_of(contrastive, resolution=resolution, bpe=bpe)
        sizes["image_embedding_dim"] = network["embedding_dim"]
        loaders.append(partial(load_image_encoder, contrastive=contrastive))
    elif {"image_embedding", "text_embedding"} & {*columns}:
        raise ValueError("image_embedding and text_embedding need a contrastive model")
    if {"text_states", "text_embedding"} & {*columns}:
        encoder = text_encoder or contrastive
        if encoder is None:
            raise ValueError("text_states need a contrastive model or a pretrained text encoder")
        sizes |= text_sizes(encoder)
        loaders.append(partial(load_text_encoder, encoder=encoder, bpe=bpe))
    return Frozen(tuple(loaders), sizes)


def maker_of(
    column: str,
    *,
    autoencoder: Artifact | None = None,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> Artifact | None:
    """The model that makes `column`, or None."""
    if column == "latents":
        return autoencoder
    return contrastive if column == "image_embedding" else text_encoder or contrastive


def contrastive_arguments_of(contrastive: Artifact, *, resolution: int, bpe: str) -> dict[str, Any]:
    """Arguments of a contrastive encoder's network.

    Raises ValueError for another kind of model, for smaller images than the encoder's, or another text tokenizer.
    """
    description = json.loads(contrastive.read(DESCRIPTION))
    if description["kind"] != "contrastive":
        raise ValueError(f"image_embedding needs a contrastive model, not one of kind {description['kind']}")
    if description["network"]["resolution"] > resolution:
        raise ValueError(
            f"the contrastive encoder sees images of {description['network']['resolution']} pixels, not of {resolution}"
        )
    if contrastive.read(BPE).decode() != bpe:
        raise ValueError("the contrastive encoder has the text tokenizer of another set; train it on this one")
    return description["network"]


def text_sizes(encoder: Artifact) -> dict[str, int]:
    """Length and width of an encoder's text states, as fields of DatasetInfo."""
    if DESCRIPTION not in encoder.names():
        return {name: encoder.metadata[name] for name in ("text_states_length", "text_states_dim")}
    text = json.loads(encoder.read(DESCRIPTION))["network"]["text"]
    return {"text_states_length": text["context_length"], "text_states_dim": text["model_dim"]}


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
    """Encodes rows to float32 arrays, for an encoded set: `columns` and their nulls.

    Args:
        columns: outputs of the encoders to return.
    """

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
    return text_encoder(text) if own and isinstance(text, ContrastiveText) else caption_encoder(text, parse_bpe(bpe))
