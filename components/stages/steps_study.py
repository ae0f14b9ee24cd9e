"""Steps study: what each sampler of one trained diffusion model reaches with how many network evaluations."""

from functools import partial
from typing import Any

from components.data.held_out import held_out_arrays
from components.data.shards import load_index
from components.data.subset import read_random_part
from components.evaluation.features import check_feature_network
from components.evaluation.parallel import finish_jobs
from components.evaluation.roads import measured_requests
from components.evaluation.steps_study import (
    StepsSampler,
    StepsStudyConfig,
    draw_steps,
    points_of,
    settings_of,
    steps_headline,
    steps_summary,
    steps_table,
)
from components.evaluation.variants import measure_made, read_made, variant_jobs, variants_grid
from components.sampling.cascade import Cascade
from components.stages.context import StageContext
from components.storage.artifact import Artifact


def study_steps(config: StepsStudyConfig, context: StageContext, *, images: Artifact, cascade: Artifact) -> Artifact:
    """Sample the base of the cascade by every sampler and number of steps, and measure distances.

    Returns an artifact of kind `report`: plot, table, figures, and a picture with a row for each setting.
    Raises FeatureNetworkError before any work if the feature network is not installed.
    """
    check_feature_network(config.feature_network)
    index, models = load_index(images.url("index.json")), Cascade.load(cascade.download(context.scratch()))
    if models.base is None:
        raise ValueError("this cascade has no diffusion model whose samplers could be compared")
    size = models.base.settings["resolution"]
    trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=size)
    asked: dict[str, Any] = {"labels": trained.label, "captions": trained.caption, "count": config.samples}
    settings = settings_of(config)
    jobs = variant_jobs(settings, measured_requests(models, "diffusion", **asked, seed=config.seed))

    every = [job for group in jobs.values() for job in group]
    total, done, files = sum(len(job.requests) for job in every), 0, context.files_store
    for job in finish_jobs(partial(StepsSampler, cascade, files), every, files=files, resources=context.resources):
        context.report_pictures(done := done + len(job.requests), total)
    made = {name: read_made(files, group) for name, group in jobs.items()}

    rows = measure_made(
        made,
        config,
        trained=trained.image,
        held_out=held_out_arrays(index, resolution=size, limit=config.samples)["image"],
        resources=context.resources,
        progress=context.report_pictures,
    )
    points = points_of(settings, made, rows)
    return context.commit_study(
        plots=draw_steps(points, rows, config, salt=context.stage),
        tables={"Fréchet distances by sampler and steps": steps_table(points, config)},
        summary=steps_summary(points, config),
        headline=steps_headline(points, config),
        pictures={"by_steps": variants_grid({settings[name].title: found for name, found in made.items()})},
    )
