"""Noising of held-out images by the forward process, with a diffusion model's predictions of x_0."""

from functools import partial

from components.data.shards import load_index
from components.evaluation.noising_study import VARIANCE, NoisingStudyConfig, study_model
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext


def study_noising(config: NoisingStudyConfig, context: StageContext, *, images: Artifact, model: Artifact) -> Artifact:
    """Noise held-out images step by step, and let the model predict x_0 at each of the steps.

    Returns an artifact of kind `report`: images of both, plots of the values of x_t, of the schedules and of the error
    of the predicted x_0, and a table of the variance of x_t. Raises ValueError as `study_model`.
    """
    with context.pool() as pool:
        index = load_index(images.url("index.json"))
        found = pool.call(partial(study_model, config, index, model, salt=context.stage))
    return context.commit_study(
        plots=found.plots,
        tables={VARIANCE: found.table},
        summary=found.summary,
        headline={"mean squared error of the predicted x_0": found.summary["predicted_x_0_error"]},
        images=found.images,
    )
