"""Guidance study: what each kind of guidance does to class accuracy and distance, by its scale."""

from functools import partial
from typing import Any

import numpy as np

from components.data.held_out import held_out_arrays
from components.data.shards import load_index
from components.data.subset import read_random_part
from components.evaluation.features import check_feature_network
from components.evaluation.guidance_study import (
    GuidanceStudyConfig,
    GuidedSampler,
    draw_guidance,
    guidance_headline,
    guidance_summary,
    guidance_table,
    judge,
    load_models,
    points_of,
    settings_of,
)
from components.evaluation.parallel import finish_jobs
from components.evaluation.roads import measured_requests
from components.evaluation.variants import measure_made, read_made, variant_jobs, variants_grid
from components.sampling.cascade import Cascade
from components.stages.context import StageContext
from components.storage.artifact import Artifact


def study_guidance(
    config: GuidanceStudyConfig, context: StageContext, *, images: Artifact, **models: Artifact
) -> Artifact:
    """Sample under each guidance and scale from the same seeds and labels, and measure accuracy and distance.

    Args:
        models: those of `Models` by name: base, judge, and weaker and classifier where methods need them.

    Returns an artifact of kind `report`: plots, table, figures, and a picture with a row for each setting.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    index, loaded, settings = load_index(images.url("index.json")), load_models(models), settings_of(config)
    size = loaded.base.settings["resolution"]
    trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=size)
    held_out = held_out_arrays(index, resolution=size, limit=config.samples)
    asked: dict[str, Any] = {"labels": trained.label, "captions": [""] * len(trained.label), "count": config.samples}
    jobs = variant_jobs(settings, measured_requests(Cascade(base=loaded.base), "diffusion", **asked, seed=config.seed))

    every = [job for group in jobs.values() for job in group]
    total, done, files = sum(len(job.requests) for job in every), 0, context.files_store
    make_worker = partial(GuidedSampler, config, models, files)
    for job in finish_jobs(make_worker, every, files=files, resources=context.resources):
        context.report_pictures(done := done + len(job.requests), total)
    made = {name: read_made(files, group) for name, group in jobs.items()}

    rows = measure_made(
        made,
        config,
        trained=trained.image,
        held_out=held_out["image"],
        resources=context.resources,
        progress=context.report_pictures,
    )
    points = points_of(settings, made, rows)
    seen = float(np.mean(judge(loaded.judge, held_out["image"]) == held_out["label"]))
    return context.commit_study(
        plots=draw_guidance(points, rows, config, held_out_accuracy=seen, salt=context.stage),
        tables={"Accuracy and Fréchet distance by guidance": guidance_table(points, config)},
        summary=guidance_summary(points, config, held_out_accuracy=seen),
        headline=guidance_headline(points, config),
        pictures={"by_guidance": variants_grid({settings[name].title: found for name, found in made.items()})},
    )
