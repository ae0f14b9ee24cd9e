"""Evaluation: what the tokenizer keeps, and how far from the training pictures everything is that was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from components.data.held_out import held_out_arrays
from components.data.shards import ShardIndex, load_index
from components.data.subset import read_random_part
from components.evaluation.codebook import CodebookUse, codebook_use, reconstruct
from components.evaluation.distance import Gaussian, pack_gaussian
from components.evaluation.features import check_feature_network
from components.evaluation.gallery import draw_reconstructions
from components.evaluation.measure import DistanceRow, MeasureConfig, compared_sets, measure_distances
from components.evaluation.roads import read_measured
from components.models.autoencoder import Autoencoder
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.storage.bundle import load_bundle


class EvaluationConfig(MeasureConfig):
    """By what distances are measured, and to how many pictures."""

    held_out_samples: int = Field(1024, ge=2)  # at most so many to reconstruct


def evaluate(
    config: EvaluationConfig,
    context: StageContext,
    *,
    images: Artifact,
    tokenizer: Artifact | None = None,
    samples: Artifact | None = None,
) -> Artifact:
    """Reconstruct held-out pictures and measure Fréchet distances to the training pictures.

    Args:
        tokenizer: an autoencoder, where there is one to judge.
        samples: what the roads made, where there are any.

    Returns an artifact of kind `report`: a picture, statistics of the reference, and all figures as metadata.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    index, folder = load_index(images.url("index.json")), context.scratch()
    metadata: dict[str, Any] = {"feature_network": config.feature_network, "distances": [], "summary": {}}
    made: np.ndarray | None = None
    if tokenizer is not None:
        kept = keep(config, context, index, tokenizer, folder)
        made = kept.pictures
        metadata |= {} if kept.use is None else {"held_out_codebook": kept.use.model_dump()}
    if config.feature_network != "none":
        rows, reference = measure(config, context, index, made, {} if samples is None else read_measured(samples))
        (folder / "reference.npz").write_bytes(pack_gaussian(reference))
        metadata["summary"] = {row.metric(config.feature_network): row.distance for row in rows}
        metadata["distances"] = [row.model_dump() for row in rows]
        context.recorder.metrics(context.stage, 0, metadata["summary"])
    return context.commit("report", folder=folder, metadata=metadata)


class Kept(NamedTuple):
    """What an autoencoder keeps of held-out pictures."""

    pictures: np.ndarray  # (N, H, W, 3) uint8
    use: CodebookUse | None  # None: it has no codes


def keep(config: EvaluationConfig, context: StageContext, index: ShardIndex, tokenizer: Artifact, folder: Path) -> Kept:
    """Reconstruct held-out pictures, and draw them in `folder`."""
    bundle = load_bundle(tokenizer.download(context.scratch()))
    assert isinstance(bundle.module, Autoencoder)
    how = {"resolution": bundle.settings["resolution"], "limit": config.held_out_samples}
    held_out = held_out_arrays(index, **how)["image"]
    made = reconstruct(bundle.module, held_out)
    png = draw_reconstructions(held_out, made.pictures)
    (folder / "originals_and_reconstructions.png").write_bytes(png)
    context.recorder.image(context.stage, 0, "originals_and_reconstructions", png)
    if made.tokens is None:
        return Kept(made.pictures, None)
    return Kept(made.pictures, codebook_use(made.tokens, codebook_size=bundle.module.codebook_size))


def measure(
    config: EvaluationConfig,
    context: StageContext,
    index: ShardIndex,
    reconstructions: np.ndarray | None,
    roads: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[list[DistanceRow], Gaussian]:
    """Distances of everything that was made to training pictures, at the largest size of them all."""
    made = [pictures for stages in roads.values() for pictures in stages.values()]
    largest = max(pictures.shape[1] for pictures in (*made, *([] if reconstructions is None else [reconstructions])))
    trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=largest).image
    held_out = held_out_arrays(index, resolution=largest, limit=config.held_out_samples)["image"]
    return measure_distances(
        compared_sets(trained, held_out, reconstructions, roads, seed=config.seed),
        network=config.feature_network,
        precision=config.precision,
        seed=config.seed,
        resources=context.resources,
        progress=context.report_pictures,
    )
