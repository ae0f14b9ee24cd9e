"""Steps study: what each sampler of one trained diffusion model reaches with how many network evaluations."""

from functools import partial
from typing import Any

from components.data.shards import load_index
from components.evaluation.features import check_feature_network
from components.evaluation.steps_study import (
    StepsSampler,
    StepsStudyConfig,
    draw_steps,
    plan_study,
    points_of,
    settings_of,
    steps_headline,
    steps_summary,
    steps_table,
)
from components.evaluation.variants import measure_made, read_all_figures, variant_jobs, variants_grid
from components.stages.context import StageContext
from components.storage.artifact import Artifact


def study_steps(config: StepsStudyConfig, context: StageContext, *, images: Artifact, cascade: Artifact) -> Artifact:
    """Sample the base of the cascade by every sampler and number of steps, and measure distances.

    Returns an artifact of kind `report`: plot, table, figures, and an image with a row for each setting.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    index, settings, files, done = load_index(images.url("index.json")), settings_of(config), context.files_store, 0
    with context.pool() as pool:
        plan = pool.call(partial(plan_study, config, index, cascade))
        jobs = variant_jobs(settings, plan.requests)
        every = [job for group in jobs.values() for job in group]
        total = sum(len(job.requests) for job in every)
        for job in pool.finish(partial(StepsSampler, cascade, files), every, files=files):
            context.report_images(done := done + len(job.requests), total)
        how: dict[str, Any] = {"resolution": plan.resolution, "files": files, "pool": pool}
        rows = measure_made(jobs, config, index, **how, progress=context.report_images)
        made = pool.call(partial(read_all_figures, files, jobs))
    points = points_of(settings, made, rows)
    return context.commit_study(
        plots=draw_steps(points, rows, config, salt=context.stage),
        tables={"Fréchet distances by sampler and steps": steps_table(points, config)},
        summary=steps_summary(points, config),
        headline=steps_headline(points, config),
        images={"by_steps": variants_grid({settings[name].title: found for name, found in made.items()})},
    )
