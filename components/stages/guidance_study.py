"""Guidance study: what each kind of guidance does to class accuracy and distance, by its scale."""

from functools import partial
from typing import Any

from components.data.shards import load_index
from components.evaluation.features import check_feature_network
from components.evaluation.guidance_study import (
    GuidanceStudyConfig,
    GuidedSampler,
    draw_guidance,
    guidance_headline,
    guidance_summary,
    guidance_table,
    plan_study,
    points_of,
    settings_of,
)
from components.evaluation.variants import measure_made, read_all_figures, variant_jobs, variants_grid
from components.stages.context import StageContext
from components.storage.artifact import Artifact


def study_guidance(
    config: GuidanceStudyConfig, context: StageContext, *, images: Artifact, **models: Artifact
) -> Artifact:
    """Sample under each guidance and scale from the same seeds and labels, and measure accuracy and distance.

    Args:
        models: those of `Models` by name: base, judge, and weaker and classifier where methods need them.

    Returns an artifact of kind `report`: plots, table, figures, and an image with a row for each setting.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    index, settings, files, done = load_index(images.url("index.json")), settings_of(config), context.files_store, 0
    with context.pool() as pool:
        plan = pool.call(partial(plan_study, config, index, models))
        jobs = variant_jobs(settings, plan.requests)
        every = [job for group in jobs.values() for job in group]
        total = sum(len(job.requests) for job in every)
        for job in pool.finish(partial(GuidedSampler, config, models, files), every, files=files):
            context.report_images(done := done + len(job.requests), total)
        how: dict[str, Any] = {"resolution": plan.resolution, "files": files, "pool": pool}
        rows = measure_made(jobs, config, index, **how, progress=context.report_images)
        made = pool.call(partial(read_all_figures, files, jobs))
    points, seen = points_of(settings, made, rows), plan.held_out_accuracy
    return context.commit_study(
        plots=draw_guidance(points, rows, config, held_out_accuracy=seen, salt=context.stage),
        tables={"Accuracy and Fréchet distance by guidance": guidance_table(points, config)},
        summary=guidance_summary(points, config, held_out_accuracy=seen),
        headline=guidance_headline(points, config),
        images={"by_guidance": variants_grid({settings[name].title: found for name, found in made.items()})},
    )
