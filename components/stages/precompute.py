"""Frozen networks: their work on a whole set before training, and the import of a text encoder.

Latents, embeddings and states of captions stand next to each image, or smaller images, one file for each shard:
trainings read what they would make anew at each step. A pretrained text encoder is copied into the store."""

import json
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from components.configuration.config import IDENTITY, Config, Since
from components.configuration.optimization import Precision
from components.data.encoding import commit_set, part_names, set_encoder, shard_jobs
from components.data.shards import BPE, INDEX, load_index, read_bpe
from components.runtime import events
from components.runtime.storage.artifact import Artifact, FileEntry, read_records, upload_attempt
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, absolute
from components.sampling.frozen_text import LENGTH, load_frozen_text
from components.stages.context import StageContext
from components.training.frozen import ColumnEncoder, FrozenNetworks, frozen_encoders
from components.weights.files import PACKAGE, encoder_folder, fetch_encoder

FACTS = {"source", "license", "samples", "train_samples", "classes", "resolution"}  # in the metadata
Column = Literal["latents", "image_embedding", "text_states", "text_embedding"]


class PrecomputeConfig(Config):
    """Arrays to encode beforehand, and the size of the stored images."""

    columns: tuple[Column, ...] = ()  # arrays of each sample
    resolution: int = Field(ge=1)  # side of the images that encoders see
    kept_resolution: int | None = Field(None, ge=1)  # side of the images that are kept; None: resolution
    precision: Annotated[Precision, Since("fp32")] = "fp32"  # bf16 on GPUs

    def _check(self) -> None:
        if len({*self.columns}) < len(self.columns):
            raise ValueError(f"columns name one twice: {', '.join(self.columns)}")

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
    """Encodes the images and captions of both splits; shards that a killed try has finished are kept.
    Returns an artifact of kind `shards`, a set of the same samples in the same order: `index.json`, `bpe.json`, tars,
    and for arrays of texts what stands for no text (`null_text_states.npy`).
    Raises ValueError, before any work, for a column without its encoder, or one that does not fit."""
    index, files = load_index(images.url(INDEX)), context.files_store
    networks = FrozenNetworks(autoencoder, contrastive, text_encoder)
    columns: tuple[str, ...] = config.columns
    makers = {name: maker.identity for name in columns if (maker := networks.maker_of(name)) is not None}
    bpe = read_bpe(index)
    encoders = frozen_encoders(columns, networks, resolution=config.resolution, bpe=bpe).load_encoders
    sizes = {"resolution": config.resolution, "kept_resolution": config.kept}
    how = {"threads": context.resources.reader_threads, "precision": config.precision}
    load = partial(ColumnEncoder, encoders, config.columns) if encoders else None
    make_encoder, jobs = set_encoder(index, load, files=files, **sizes, **how), shard_jobs(index, part_names(index))
    with context.pool() as pool:
        for done, _ in enumerate(pool.finish(make_encoder, jobs, files=files), 1):
            context.recorder.emit(events.Progress(context.stage, done, len(jobs), "shard"))
    files.write(BPE, bpe.encode())
    records = read_records(files, part_names(index))
    encoded = commit_set(index, records, files, kept_resolution=config.kept, made_by=makers)
    facts = encoded.model_dump(mode="json", include=FACTS)
    metadata = facts | {"arrays": {info.name: list(info.shape) for info in encoded.arrays}}
    parts = [entry for record in records for entry in record.files]
    return context.commit("shards", parts=parts, written=[INDEX, BPE], metadata=metadata)


class TextEncoderConfig(Config):
    """Address of the text encoder, and the length of a text in tokens."""

    # folder that transformers' save_pretrained wrote: local (the worker may be in another one), in object storage, or
    # package://NAME/FOLDER, in the installed Python package NAME
    uri: Annotated[str, Field(min_length=1), AfterValidator(absolute)]
    length: int = Field(32, ge=2)  # tokens of the encoder's own; longer texts lose their end
    pads: Annotated[Literal["hidden", "attended"], Since("hidden")] = "hidden"  # attended: Stable Diffusion
    skipped_layers: Annotated[int, Since(0)] = Field(0, ge=0)  # 1: the "penultimate" layer's states


def import_text_encoder(config: TextEncoderConfig, context: StageContext) -> Artifact:
    """Copies the encoder's files into a model artifact; its metadata has the shape of a text's states.
    Raises FrozenTextError, in one line, if there is no such encoder or it can't be loaded."""
    with context.pool() as pool:
        entries, (length, width) = pool.call(partial(copy_text_encoder, config, context.store))
    return context.commit("model", entries=entries, metadata={"text_states_length": length, "text_states_dim": width})


def encoder_identity(config: TextEncoderConfig) -> dict[str, Any]:
    """The configuration as it enters the key, with the version of the package that the encoder lies in.
    Raises FrozenTextError without the package."""
    values = config.model_dump(mode="json", context=IDENTITY)
    if not config.uri.startswith(PACKAGE):
        return values
    encoder_folder(config.uri)
    return values | {"package": version(config.uri.removeprefix(PACKAGE).partition("/")[0])}


def copy_text_encoder(config: TextEncoderConfig, store: Store) -> tuple[list[FileEntry], tuple[int, int]]:
    """Copies the encoder's files to the stage's store and loads the encoder once. Runs in a worker.
    Returns the entries of the files and the shape of a text's states. Raises FrozenTextError."""
    with scratch_folder("text-encoder") as place:
        folder = fetch_encoder(config.uri, place)
        unlike = config.model_dump(exclude={"uri", "length"}, exclude_defaults=True)
        (folder / LENGTH).write_text(json.dumps({"length": config.length, "lowered": True} | unlike))
        return upload_attempt(store, folder), load_frozen_text(folder).states_shape
