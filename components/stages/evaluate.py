"""Evaluation: what the tokenizer keeps, and how far from the training pictures everything is that was made."""

from functools import partial

from pydantic import Field

from components.configuration import Config
from components.data.held_out import held_out_arrays, read_split
from components.data.shards import load_index
from components.data.subset import random_part
from components.evaluation.codebook import codebook_use, reconstruct
from components.evaluation.distance import pack_gaussian
from components.evaluation.features import FeatureNetwork, FeaturePrecision, check_feature_network
from components.evaluation.gallery import draw_reconstructions
from components.evaluation.measure import DistanceRow, compared_sets, measure_distances
from components.evaluation.roads import read_measured
from components.models.autoencoder import VQAutoencoder
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.storage.bundle import load_bundle


class EvaluationConfig(Config):
    """By what distances are measured, and to how many pictures."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    precision: FeaturePrecision = "fp32"  # bf16 changes distances by less than 1 %, and is faster where it is native
    reference_samples: int = Field(10_000, ge=2)  # at most so many training pictures
    held_out_samples: int = Field(1024, ge=2)  # at most so many to reconstruct
    seed: int = Field(0, ge=0)


def evaluate(
    config: EvaluationConfig, context: StageContext, *, images: Artifact, tokenizer: Artifact, samples: Artifact
) -> Artifact:
    """Reconstruct held-out pictures and measure Fréchet distances to the training pictures.

    Returns an artifact of kind `report`: a picture, statistics of the reference, and all figures as metadata.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    bundle = load_bundle(tokenizer.download(context.scratch()))
    resolution, codebook_size = bundle.settings["resolution"], bundle.network["codebook_size"]
    index = load_index(images.url("index.json"))
    held_out = held_out_arrays(index, resolution=resolution, limit=config.held_out_samples)["image"]
    assert isinstance(bundle.module, VQAutoencoder)
    made = reconstruct(bundle.module, held_out)
    folder, png = context.scratch(), draw_reconstructions(held_out, made.pictures)
    (folder / "originals_and_reconstructions.png").write_bytes(png)
    context.recorder.image(context.stage, 0, "originals_and_reconstructions", png)

    rows: list[DistanceRow] = []
    if config.feature_network != "none":
        roads = read_measured(samples)
        largest = max([resolution, *(pictures.shape[1] for stages in roads.values() for pictures in stages.values())])
        part = random_part(index, samples=config.reference_samples, seed=config.seed)
        trained = read_split(part, "train", resolution=largest, limit=config.reference_samples).image
        rows, reference = measure_distances(
            compared_sets(trained, held_out, made.pictures, roads, seed=config.seed),
            network=config.feature_network,
            precision=config.precision,
            seed=config.seed,
            resources=context.resources,
            progress=partial(report_pictures, context),
        )
        (folder / "reference.npz").write_bytes(pack_gaussian(reference))
    figures = {row.metric(config.feature_network): row.distance for row in rows}
    context.recorder.metrics(context.stage, 0, figures)
    metadata = {
        "feature_network": config.feature_network,
        "distances": [row.model_dump() for row in rows],
        "held_out_codebook": codebook_use(made.tokens, codebook_size=codebook_size).model_dump(),
        "summary": figures,
    }
    return context.commit("report", folder=folder, metadata=metadata)


def report_pictures(context: StageContext, done: int, total: int) -> None:
    context.recorder.progress(context.stage, step=done, total=total, unit="picture")
