"""What a workflow needs of this machine, asked before anything starts."""

from components.evaluation.features import FeatureNetworkError, check_feature_network
from components.evaluation.measure import MeasureConfig
from components.sampling.frozen_text import FrozenTextError
from components.stages.text_encoder import TextEncoderConfig, check_text_encoder
from components.training.config import AutoencoderConfig, TrainingConfig
from components.training.perceptual_weights import PerceptualWeightsError, check_perceptual_network
from pipelines.profiles import Profile
from pipelines.workflow import Stage, UsageError, Workflow


def check_parts(workflow: Workflow) -> None:
    """Raise UsageError if a network that the recipe names can't be had here."""
    try:
        for stage in workflow.stages:
            if isinstance(stage.config, AutoencoderConfig) and stage.config.perceptual_weight > 0:
                check_perceptual_network(stage.config.perceptual_network)
            if isinstance(stage.config, MeasureConfig):
                check_feature_network(stage.config.feature_network)
            if isinstance(stage.config, TextEncoderConfig):
                check_text_encoder(stage.config)
    except (PerceptualWeightsError, FeatureNetworkError, FrozenTextError) as error:
        raise UsageError(str(error)) from error


def check_batches(workflow: Workflow, profile: Profile, *, cluster: dict[str, float]) -> None:
    """Raise UsageError if the workers of a training can't share its global batch equally."""
    for name, config in trainings(workflow).items():
        workers = profile.resources(name, cluster=cluster, branches=branches(workflow)).num_workers
        if config.global_batch_size % workers:
            size = config.global_batch_size
            raise UsageError(
                f"{name}.global_batch_size {size} can't be shared by {workers} workers; change one of them"
            )


def branches(workflow: Workflow) -> int:
    """How many trainings can run at once: those that wait for no other training."""
    return max(1, sum(not trains_late(workflow, name) for name in trainings(workflow)))


def trains_late(workflow: Workflow, stage: str) -> bool:
    """Whether a training waits for another one: most of the others are then done, and it may use more of the cores."""
    names = trainings(workflow)
    return stage in names and _trained_before(workflow.by_name[stage], names)


def trainings(workflow: Workflow) -> dict[str, TrainingConfig]:
    return {stage.name: stage.config for stage in workflow.stages if isinstance(stage.config, TrainingConfig)}


def _trained_before(stage: Stage, names: dict[str, TrainingConfig]) -> bool:
    return any(parent.name in names or _trained_before(parent, names) for parent in stage.parents())
