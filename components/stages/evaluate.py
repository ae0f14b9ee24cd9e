"""Evaluation of reconstructions and of generated images, by distances to the training images."""

from functools import partial
from typing import Any

from pydantic import Field

from components.data.encoding import describe_autoencoder
from components.data.held_out import random_part
from components.data.shards import load_index
from components.evaluation.codebook import (
    KeptJob,
    ReconstructionMeasurer,
    codebook_use,
    draw_kept,
    kept_histogram,
    kept_jobs,
)
from components.evaluation.feature_files import FeatureSet, measure_features
from components.evaluation.features import check_feature_network
from components.evaluation.generated import measured_stages
from components.evaluation.image_sets import (
    REFERENCE,
    ShardImages,
    compared_sets,
    held_out_parts,
    split_parts,
    window_sets,
)
from components.evaluation.measure import (
    DistanceRow,
    MeasureConfig,
    distance_rows,
    packed_reference,
)
from components.runtime import events
from components.runtime.pool import Pool
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext

RECONSTRUCTED = "reconstructions of held-out images"


class EvaluationConfig(MeasureConfig):
    """Feature network, precision and image counts of distances, with the size of windows."""

    stage_version = 4  # precision, recall and standard errors beside distances

    held_out_samples: int = Field(1024, ge=2)  # at most so many to reconstruct
    window: int | None = Field(None, ge=8)  # pixels; larger images are also compared window by window


def evaluate(
    config: EvaluationConfig,
    context: StageContext,
    *,
    images: Artifact,
    tokenizer: Artifact | None = None,
    samples: Artifact | None = None,
) -> Artifact:
    """Reconstruct held-out images and measure Fréchet distances to the training images.

    Args:
        tokenizer: an autoencoder, where there is one to judge.
        samples: what the generators made, where there are any.

    Returns an artifact of kind `report`: images, statistics of the reference, and all figures as metadata.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    metadata: dict[str, Any] = {"feature_network": config.feature_network, "distances": [], "summary": {}}
    folder, kept = context.scratch(), []
    with context.pool() as pool:
        if tokenizer is not None:
            size = {"resolution": describe_autoencoder(tokenizer).resolution, "limit": config.held_out_samples}
            held_out = held_out_parts(load_index(images.url("index.json")), **size)
            kept = keep(config, context, pool, tokenizer, held_out)
            for name, png in pool.call(partial(draw_kept, tokenizer, held_out)).items():
                (folder / f"{name}.png").write_bytes(png)
                context.recorder.emit(events.Image(context.stage, 0, name, png))
            histogram = pool.call(partial(kept_histogram, kept, context.work_store))
            if histogram is not None:
                count = sum(part.num_images for part in held_out)
                metadata["held_out_codebook"] = codebook_use(histogram, count).model_dump()
        if config.feature_network != "none":
            rows, reference = measure(config, context, pool, images, samples, kept)
            (folder / "reference.npz").write_bytes(reference)
            metadata["summary"] = {
                name: value for row in rows for name, value in row.metrics(config.feature_network).items()
            }
            metadata["distances"] = [row.model_dump() for row in rows]
            context.recorder.emit(events.Metrics(context.stage, 0, metadata["summary"]))
    return context.commit("report", folder=folder, metadata=metadata)


def keep(
    config: EvaluationConfig, context: StageContext, pool: Pool, tokenizer: Artifact, held_out: list[ShardImages]
) -> list[KeptJob]:
    """Measures reconstructions of held-out images into files of the stage's work."""
    total, done, jobs, work = sum(part.num_images for part in held_out), 0, kept_jobs(held_out), context.work_store
    for job in pool.finish(partial(ReconstructionMeasurer, tokenizer, config, work), jobs, files=work):
        context.report_images(done := done + job.part.num_images, total)
    return jobs


def measure(
    config: EvaluationConfig,
    context: StageContext,
    pool: Pool,
    images: Artifact,
    samples: Artifact | None,
    kept: list[KeptJob],
) -> tuple[list[DistanceRow], bytes]:
    """Distances of all generated images to training images, and packed reference statistics.

    Training images are read at the largest size of all sets; the packed statistics are those of the training images.
    """
    index, work = load_index(images.url("index.json")), context.work_store
    made = [] if samples is None else measured_stages(samples)
    largest = max([stage.side for stage in made] + [job.part.resolution for job in kept])
    trained = split_parts(
        random_part(index, samples=config.reference_samples, seed=config.seed),
        "train",
        resolution=largest,
        limit=config.reference_samples,
    )
    held_out = held_out_parts(index, resolution=largest, limit=config.held_out_samples)
    sets = compared_sets(trained, held_out, made, seed=config.seed)
    side, windows = config.window, {}
    if side is not None and side < largest:
        windows = window_sets(trained, held_out, made, side=side, seed=config.seed)
    network, precision = config.feature_network, config.precision
    found = measure_features(
        sets | windows, network=network, precision=precision, work=work, pool=pool, progress=context.report_images
    )
    measured = [images for images in found if images.name in sets]
    if kept:
        measured.append(FeatureSet(RECONSTRUCTED, "model", tuple(job.name for job in kept)))
    rows = distance_rows(measured, work, pool=pool, seed=config.seed, refined=True)
    if windows:
        cut = [images for images in found if images.name in windows]
        rows += distance_rows(cut, work, pool=pool, seed=config.seed, refined=True, reference=next(iter(windows)))
    (references,) = (images.files for images in measured if images.name == REFERENCE)
    reference = pool.call(partial(packed_reference, work, references))
    return sorted(rows, key=lambda row: (row.purpose == "model", row.name != RECONSTRUCTED)), reference
