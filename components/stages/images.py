"""Ingest: images of any source as verified shards with an index and a caption tokenizer."""

from typing import Annotated, Any

from pydantic import Field

from components.configuration.config import IDENTITY, Unkeyed, refuse
from components.data.ingest import IngestConfig, ingest
from components.data.shards import BPE, INDEX
from components.data.source_check import detect_source, source_digest
from components.runtime.storage.artifact import Artifact, FileEntry
from components.runtime.storage.model_table import rows
from components.stages.context import StageContext


class ImagesConfig(IngestConfig):
    """Source and processing of the data set; keys contain the digest of its listing, no address."""

    # openmoji, scenes, fashion_mnist, photographs, or the URL of tars, Parquet, images, …
    source: Annotated[str, Unkeyed()] = Field(min_length=1)

    def _check(self) -> None:
        super()._check()
        fault = f"held_out_pairs are colors with shapes of scenes, not of {self.source}: set images.held_out_pairs=0"
        refuse(self.held_out_pairs and self.source != "scenes", fault)


def images_identity(config: ImagesConfig) -> dict[str, Any]:
    """The configuration that enters the key: a digest of the listing stands for the address."""
    digest = source_digest(*detect_source(config.source), config.columns)
    return {**config.model_dump(mode="json", context=IDENTITY), "source_digest": digest}


def ingest_images(config: ImagesConfig, context: StageContext) -> Artifact:
    """Writes the shards of the set; existing tars are only indexed.

    Returns an artifact of kind `shards`: `index.json`, `bpe.json` and the tars that were written here.

    Raises SourceError, ShardError and DataError as `ingest` does.
    """
    name, path = detect_source(config.source)
    settings = IngestConfig(**config.model_dump(exclude={"source"}))
    core = context.resources.cpus_per_core  # tasks of one thread; a training's readers wait
    place = {"out": context.files_store, "num_cpus": core, "warn": context.warn}
    index = ingest(name, path, config=settings, progress=context.report_images, **place)
    shards, quarantined = list[FileEntry](), list[dict[str, Any]]()
    # A set may have a million shards: one pass over dictionaries, no objects.
    for entry in rows(index.shards):
        quarantined += entry["quarantined"]
        if "/" not in entry["url"]:
            shards.append(FileEntry(path=entry["url"], bytes=entry["bytes"], sha256=entry["sha256"]))
    facts = {"source", "license", "samples", "train_samples", "classes", "resolution", "held_out_pairs"}
    metadata = index.model_dump(mode="json", include=facts)
    metadata["quarantined"] = quarantined
    return context.commit("shards", parts=shards, written=[INDEX, BPE], metadata=metadata)
