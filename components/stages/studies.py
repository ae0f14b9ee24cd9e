"""The stage of every study: its configuration names the study, its other inputs are the models."""

from functools import partial
from typing import Any

from components.data.shards import load_index
from components.evaluation.features import check_feature_network
from components.evaluation.measure import MeasureConfig
from components.evaluation.study import ModelStudy
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext


def run_study(config: Any, context: StageContext, *, images: Artifact, **models: Artifact) -> Artifact:
    """Plans the jobs of a study, does them, measures what they made, and commits what is found.

    Args:
        config: the configuration of a study, such as StepsStudyConfig; `config.study` is the class.
        models: by the names that the study knows.

    Returns an artifact of kind `report`: plots, tables, figures and images.
    Raises, before any work, FeatureNetworkError if the feature network is not installed, and ValueError of one line for
    models or images that do not fit the study.
    """
    if isinstance(config, MeasureConfig):
        check_feature_network(config.feature_network)
    index, files, done = load_index(images.url("index.json")), context.files_store, 0
    study: ModelStudy[Any] = config.study(config, index, models, files, context.stage)
    with context.pool() as pool:
        plan = pool.call(study.plan)
        total = sum(map(study.images_of, plan.jobs))
        for job in pool.finish(study.worker, plan.jobs, files=files):
            context.report_images(done := done + study.images_of(job), total)
        anew = context.work_store if context.forced else None
        measured = study.measure(plan, pool, progress=context.report_images, anew=anew)
        findings = pool.call(partial(study.findings, plan, measured))
    return context.commit_study(**findings._asdict())
