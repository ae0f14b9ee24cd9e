"""Encoding of images and captions by frozen networks, a single time before training.

Latents, embeddings and states of captions stand next to each image, or smaller images, one file for each shard.
Trainings then read what they would make anew at each step.
"""

from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from components.configuration.config import Config
from components.data.encoding import commit_set, encode_set, part_names
from components.data.shards import BPE, INDEX, load_index, read_bpe
from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.kept_parts import read_records
from components.stages.context import StageContext
from components.training.frozen import ColumnEncoder, LoadEncoder, frozen_encoders, load_latent_columns, maker_of

Column = Literal["latents", "image_embedding", "text_states", "text_embedding"]


class PrecomputeConfig(Config):
    """Arrays to encode beforehand, and the size of the stored images."""

    columns: tuple[Column, ...] = ()  # arrays of each sample
    resolution: int = Field(ge=1)  # side of the images that encoders see
    kept_resolution: int | None = Field(None, ge=1)  # side of the images that are kept; None: resolution

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if len({*self.columns}) < len(self.columns):
            raise ValueError(f"columns name one twice: {', '.join(self.columns)}")
        return self

    @property
    def kept(self) -> int:
        """Side of the stored images, pixels."""
        return self.kept_resolution or self.resolution


def precompute(
    config: PrecomputeConfig,
    context: StageContext,
    *,
    images: Artifact,
    autoencoder: Artifact | None = None,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> Artifact:
    """Encodes the images and captions of both splits; finished shards are kept.

    A killed try leaves the shards that it has finished.

    Returns an artifact of kind `shards`, a set of the same samples in the same order: `index.json`, `bpe.json`, tars,
    and for arrays of texts what stands for no text (`null_text_states.npy`).

    Raises ValueError, before any work, for a column without its encoder, or one that does not fit.
    """
    index, files = load_index(images.url(INDEX)), context.files_store
    models = {"autoencoder": autoencoder, "contrastive": contrastive, "text_encoder": text_encoder}
    makers: dict[str, str] = {
        name: maker.identity for name in config.columns if (maker := maker_of(name, **models)) is not None
    }
    encoders = encoders_of(config, bpe=read_bpe(index), **models)
    sizes = {"resolution": config.resolution, "kept_resolution": config.kept}
    load = partial(ColumnEncoder, encoders, config.columns) if encoders else None
    for done in encode_set(index, load, files=files, resources=context.resources, warn=context.warn, **sizes):
        context.recorder.emit(events.Progress(context.stage, done, len(index.shards), "shard"))
    files.write(BPE, read_bpe(index).encode())
    records = read_records(files, part_names(index))
    encoded = commit_set(index, records, files, kept_resolution=config.kept, made_by=makers)
    metadata = {
        "source": encoded.source,
        "license": encoded.license,
        "samples": encoded.samples,
        "train_samples": encoded.train_samples,
        "classes": list(encoded.classes),
        "resolution": encoded.resolution,
        "arrays": {info.name: list(info.shape) for info in encoded.arrays},
    }
    parts = [entry for record in records for entry in record.files]
    return context.commit("shards", parts=parts, written=[INDEX, BPE], metadata=metadata)


def encoders_of(
    config: PrecomputeConfig, *, bpe: str, autoencoder: Artifact | None = None, **others: Artifact | None
) -> list[LoadEncoder]:
    """Loaders of the encoders of all columns.

    Raises ValueError for a column without its encoder, or for an encoder that does not fit.
    """
    names = [name for name in config.columns if name != "latents"]
    encoders = list(frozen_encoders(names, resolution=config.resolution, bpe=bpe, **others).load_encoders)
    if "latents" in config.columns:
        if autoencoder is None:
            raise ValueError("latents among the columns need an autoencoder")
        encoders.append(partial(load_latent_columns, autoencoder=autoencoder))
    return encoders
