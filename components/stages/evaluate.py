"""Evaluation: what the tokenizer keeps, and how far from the training images everything is that was made."""

from functools import partial
from typing import Any

from pydantic import Field

from components import events
from components.data.shards import load_index
from components.data.subset import random_part
from components.evaluation.codebook import Kept, ReconstructionMeasurer, codebook_use, draw_kept, joined
from components.evaluation.distance import Gaussian, pack_gaussian
from components.evaluation.features import check_feature_network
from components.evaluation.generated import measured_stages
from components.evaluation.image_sets import ShardImages, held_out_parts, split_parts
from components.evaluation.measure import (
    REFERENCE,
    DistanceRow,
    MeasureConfig,
    compared_sets,
    distance_rows,
    measure_features,
    refined_row,
)
from components.pool import Pool
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.storage.autoencoders import describe_autoencoder

RECONSTRUCTED = "reconstructions of held-out images"


class EvaluationConfig(MeasureConfig):
    """By what distances are measured, and to how many images."""

    stage_version = 4  # precision, recall and standard errors beside distances

    held_out_samples: int = Field(1024, ge=2)  # at most so many to reconstruct


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
    folder, kept = context.scratch(), None
    with context.pool() as pool:
        if tokenizer is not None:
            size = {"resolution": describe_autoencoder(tokenizer).resolution, "limit": config.held_out_samples}
            held_out = held_out_parts(load_index(images.url("index.json")), **size)
            kept = keep(config, context, pool, tokenizer, held_out)
            for name, png in pool.call(partial(draw_kept, tokenizer, held_out)).items():
                (folder / f"{name}.png").write_bytes(png)
                context.recorder.emit(events.Image(context.stage, 0, name, png))
            if kept.histogram is not None:
                metadata["held_out_codebook"] = codebook_use(kept.histogram, kept.count).model_dump()
        if config.feature_network != "none":
            rows, reference = measure(config, context, pool, images, samples, kept)
            (folder / "reference.npz").write_bytes(pack_gaussian(reference))
            metadata["summary"] = {
                name: value for row in rows for name, value in row.metrics(config.feature_network).items()
            }
            metadata["distances"] = [row.model_dump() for row in rows]
            context.recorder.emit(events.Metrics(context.stage, 0, metadata["summary"]))
    return context.commit("report", folder=folder, metadata=metadata)


def keep(
    config: EvaluationConfig, context: StageContext, pool: Pool, tokenizer: Artifact, held_out: list[ShardImages]
) -> Kept:
    """What the tokenizer keeps of held-out images."""
    total, kept = sum(part.num_images for part in held_out), []
    for part in pool.map(partial(ReconstructionMeasurer, tokenizer, config), held_out):
        kept.append(part)
        context.report_images(sum(done.count for done in kept), total)
    return joined(kept)


def measure(
    config: EvaluationConfig,
    context: StageContext,
    pool: Pool,
    images: Artifact,
    samples: Artifact | None,
    kept: Kept | None,
) -> tuple[list[DistanceRow], Gaussian]:
    """Distances of everything that was made to training images, at the largest size of them all."""
    index = load_index(images.url("index.json"))
    made = [] if samples is None else pool.call(partial(measured_stages, samples))
    largest = max([stage.side for stage in made] + ([] if kept is None else [kept.side]))
    trained = split_parts(
        random_part(index, samples=config.reference_samples, seed=config.seed),
        "train",
        resolution=largest,
        limit=config.reference_samples,
    )
    held_out = held_out_parts(index, resolution=largest, limit=config.held_out_samples)
    sets = compared_sets(trained, held_out, made, seed=config.seed)
    features = measure_features(sets, config, pool=pool, progress=context.report_images)
    purposes = {name: members.purpose for name, members in sets.items()}
    if kept is not None and kept.features is not None:
        features[RECONSTRUCTED], purposes[RECONSTRUCTED] = kept.features, "model"
    rows, reference = distance_rows(features, purposes, seed=config.seed)
    refine = partial(refined_row, references=features[REFERENCE], reference=reference, seed=config.seed)
    rows = [refine(row, features[row.name]) if row.name in features else row for row in rows]
    return sorted(rows, key=lambda row: (row.purpose == "model", row.name != RECONSTRUCTED)), reference
