"""Studies of a trained diffusion model: samplers over steps, and guidance over scales."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from components.data.shards import ShardIndex, load_index
from components.evaluation import guidance_study, steps_study
from components.evaluation.features import check_feature_network
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.measure import measure_distances
from components.evaluation.steps_study import StepsStudyConfig
from components.evaluation.variants import (
    HELD_OUT,
    Made,
    Measured,
    StudyPlan,
    VariantJob,
    VariantSampler,
    VariantsConfig,
    read_points,
    sets_of,
    variant_jobs,
    variants_grid,
)
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext


def study_steps(config: StepsStudyConfig, context: StageContext, *, images: Artifact, cascade: Artifact) -> Artifact:
    """Samples the base of the cascade by every sampler and number of steps, and measures distances.

    Returns an artifact of kind `report`: plot, table, figures, and an image with a row for each setting.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    load, plan = partial(steps_study.load_cascade, cascade), partial(steps_study.plan_study, config, cascade)
    settings, sample = steps_study.settings_of(config), steps_study.sample_in
    found = _measured(config, context, images, settings, plan=plan, load=load, sample=sample)
    return context.commit_study(
        plots=steps_study.draw_steps(found, config, salt=context.stage),
        tables={"Fréchet distances by sampler and steps": steps_study.steps_table(found, config)},
        summary=steps_study.steps_summary(found, config),
        headline=steps_study.steps_headline(found, config),
        images={"by_steps": variants_grid(found.points)},
    )


def study_guidance(
    config: GuidanceStudyConfig, context: StageContext, *, images: Artifact, **models: Artifact
) -> Artifact:
    """Samples under each guidance and scale, and measures accuracy and distance.

    All settings start from the same seeds and labels.

    Args:
        models: those of `Models` by name: base, judge, and weaker and classifier where methods need them.

    Returns and raises as `study_steps`.
    """
    load, plan = partial(guidance_study.load_models, models), partial(guidance_study.plan_study, config, models)
    settings, sample = guidance_study.settings_of(config), partial(guidance_study.sample_in, config=config)
    found = _measured(config, context, images, settings, plan=plan, load=load, sample=sample)
    return context.commit_study(
        plots=guidance_study.draw_guidance(found, config, salt=context.stage),
        tables={"Accuracy and Fréchet distance by guidance": guidance_study.guidance_table(found, config)},
        summary=guidance_study.guidance_summary(found, config),
        headline=guidance_study.guidance_headline(found, config),
        images={"by_guidance": variants_grid(found.points)},
    )


def _measured(
    config: VariantsConfig,
    context: StageContext,
    images: Artifact,
    settings: Mapping[str, Any],
    *,
    plan: Callable[[ShardIndex], StudyPlan],
    load: Callable[[], Any],
    sample: Callable[[Any, VariantJob], Made],
) -> Measured:
    """Samples the same requests in every setting, and measures the images."""
    check_feature_network(config.feature_network)
    index, files, done = load_index(images.url("index.json")), context.files_store, 0
    with context.pool() as pool:
        planned = pool.call(partial(plan, index))
        jobs = variant_jobs(settings, planned.requests)
        every = [job for group in jobs.values() for job in group]
        for job in pool.finish(partial(VariantSampler, load, sample, files), every, files=files):
            context.report_images(done := done + len(job.requests), len(settings) * len(planned.requests))
        sets = sets_of(jobs, config, index, files, resolution=planned.resolution)
        work, progress = context.work_store, context.report_images
        rows = measure_distances(sets, config, work=work, pool=pool, progress=progress)
        distances = {row.name: row.distance for row in rows}
        points = pool.call(partial(read_points, files, jobs, distances))
    return Measured(points, distances[HELD_OUT], planned.held_out_accuracy)
