"""Ingest: images of any source as verified shards with an index and a caption tokenizer."""

from typing import Annotated, Any

from pydantic import Field

from components.configuration.config import IDENTITY, Unkeyed
from components.data.ingest import IngestConfig, ingest
from components.data.listing import FileVersion
from components.data.shards import BPE, INDEX, load_index
from components.data.source_check import detect_source, source_digest
from components.runtime.storage.artifact import Artifact, FileEntry
from components.stages.context import StageContext


class ImagesConfig(IngestConfig):
    """Source and processing of the data set; keys contain the digest of its listing, no address."""

    # openmoji, scenes, fashion_mnist, or the URL of tars, Parquet, images, …
    source: Annotated[str, Unkeyed()] = Field(min_length=1)


def images_identity(config: ImagesConfig) -> dict[str, Any]:
    """The configuration that enters the key: a digest of the listing stands for the address."""
    digest = source_digest(*detect_source(config.source), config.columns)
    return {**config.model_dump(mode="json", context=IDENTITY), "source_digest": digest}


def shard_in_place(images: Artifact) -> FileVersion | None:
    """A shard in the user's own place, not written by the stage; None if there is none."""
    index = load_index(images.url(INDEX))
    return next((FileVersion(index.url(e.url), e.bytes, "") for e in index.shards if "/" in e.url), None)


def ingest_images(config: ImagesConfig, context: StageContext) -> Artifact:
    """Writes the shards of the set; existing tars are only indexed.

    Returns an artifact of kind `shards`: `index.json`, `bpe.json` and the tars that were written here.
    """
    name, path = detect_source(config.source)
    settings = IngestConfig(**config.model_dump(exclude={"source"}))
    core = context.resources.cpus_per_core  # these tasks draw and compress in one thread; a training's readers wait
    place = {"out": context.files_store, "num_cpus": core, "warn": context.warn}
    index = ingest(name, path, config=settings, progress=context.report_images, **place)
    own = [shard for shard in index.shards if "/" not in shard.url]
    shards = [FileEntry(path=shard.url, bytes=shard.bytes, sha256=shard.sha256) for shard in own]
    facts = {"source", "license", "samples", "train_samples", "classes", "resolution"}
    metadata = index.model_dump(mode="json", include=facts)
    metadata["quarantined"] = [entry.model_dump() for shard in index.shards for entry in shard.quarantined]
    return context.commit("shards", parts=shards, written=[INDEX, BPE], metadata=metadata)
