"""Restoration: what an image-to-image model makes of held-out pictures that were degraded, task by task."""

from pydantic import Field

from components.data.degradations import jpeg_compressed
from components.data.held_out import read_split
from components.data.shards import load_index
from components.data.subset import read_random_part
from components.evaluation.features import check_feature_network
from components.evaluation.measure import REFERENCE, MeasureConfig, PictureSet, measure_distances
from components.evaluation.restoration import (
    asked_of,
    damage,
    draw_restorations,
    restoration_figures,
    restoration_table,
    restorations,
    restored_sets,
)
from components.evaluation.roads import jobs_of, joined, read_job, sample_jobs
from components.sampling.cascade import Cascade
from components.stages.context import StageContext
from components.storage.artifact import Artifact


class RestorationConfig(MeasureConfig):
    """Of how many pictures; and by what their distances to the training pictures are measured."""

    samples: int = Field(64, ge=2)  # held-out pictures, each degraded in every way


def measure_restoration(
    config: RestorationConfig, context: StageContext, *, images: Artifact, cascade: Artifact
) -> Artifact:
    """Degrade held-out pictures in every way that the cascade's model was trained for, and let it restore them.

    Returns an artifact of kind `report`: a table with signal-to-noise ratios and distances, and a picture with rows of
    what was given and what was made. Raises, before any work, FeatureNetworkError if the feature network is not
    installed, ValueError for a cascade that does not work on pictures or a set that holds no picture out.
    """
    check_feature_network(config.feature_network)
    index, models = load_index(images.url("index.json")), Cascade.load(cascade.download(context.scratch()))
    model = models.first_models.get("translate")
    if model is None:
        raise ValueError("this cascade has no image-to-image model whose restorations could be measured")
    size = model.settings["resolution"]
    held_out = read_split(index, "holdout", resolution=size, limit=config.samples)
    if not held_out.key:
        raise ValueError(f"{index.source} holds no picture out; set images.holdout_fraction")
    how = {"hole_area": model.settings["hole_area"], "factors": model.settings["factors"], "seed": config.seed}
    asked = asked_of(model, held_out.label, held_out.caption)
    damaged = damage(held_out.image, tasks=model.settings["tasks"], compress=jpeg_compressed, asked=asked, **how)

    jobs = {each.name: jobs_of(each.name.replace(" ", "_"), each.requests) for each in damaged}
    every, done, files = [job for group in jobs.values() for job in group], 0, context.files_store
    total = sum(len(job.requests) for job in every)
    for job in sample_jobs(every, cascade, files=files, resources=context.resources):
        context.report_pictures(done := done + len(job.requests), total)
    made = {name: joined([read_job(job.name, files) for job in group]).finished for name, group in jobs.items()}
    found = restorations(damaged, made, held_out.image)

    distances: dict[str, float] = {}
    if config.feature_network != "none":
        trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=size)
        rows, _ = measure_distances(
            {REFERENCE: PictureSet(trained.image, "scale")} | restored_sets(found),
            network=config.feature_network,
            precision=config.precision,
            seed=config.seed,
            resources=context.resources,
            progress=context.report_pictures,
        )
        distances = {row.name: row.distance for row in rows}
    summary = restoration_figures(found)
    return context.commit_study(
        plots={},
        tables={"Restored held-out pictures": restoration_table(found, distances)},
        summary=summary,
        headline={name: value for name, value in summary.items() if not name.endswith("degraded")},
        pictures={"restored": draw_restorations(found)},
    )
