"""What a workflow needs of this machine, asked before anything starts."""

from collections.abc import Mapping

from components.evaluation.features import FeatureNetworkError, check_feature_network
from components.evaluation.measure import MeasureConfig
from components.execution import Resources
from components.sampling.frozen_text import FrozenTextError
from components.stages.text_encoder import TextEncoderConfig, check_text_encoder
from components.training.config import AutoencoderConfig, TrainingConfig
from components.training.perceptual_weights import PerceptualWeightsError, check_perceptual_network
from pipelines.workflow import UsageError, Workflow


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


def check_batches(workflow: Workflow, shares: Mapping[str, Resources]) -> None:
    """Raise UsageError if the workers of a training can't share its global batch equally."""
    for name, config in trainings(workflow).items():
        resources = shares.get(name)
        if resources is not None and not resources.worker_counts(config.global_batch_size):
            least, most, size = resources.min_workers, resources.num_workers, config.global_batch_size
            workers = most if least is None else f"{least} to {most}"
            raise UsageError(
                f"{name}.global_batch_size {size} can't be shared by {workers} workers; change one of them"
            )


def branches(workflow: Workflow) -> int:
    """How many trainings can run at once: those that wait for no other training."""
    names = trainings(workflow)
    return max(1, sum(not workflow.before(name) & names.keys() for name in names))


def beside(workflow: Workflow, stage: str) -> int:
    """How many trainings may run while a stage does, itself included: those that it neither needs nor makes wait.

    What is no training works in several processes of a training's size instead of in one with all cores.
    """
    if stage not in trainings(workflow):
        return branches(workflow)
    related = workflow.before(stage) | workflow.after(stage)
    return min(branches(workflow), 1 + len(trainings(workflow).keys() - related - {stage}))


def stands_alone(workflow: Workflow, stage: str) -> bool:
    """Whether no other training comes before or after this one, while another branch has several to train in turn."""
    names = trainings(workflow).keys()
    in_turn = {name for name in names if (workflow.before(name) | workflow.after(name)) & names}
    return bool(in_turn) and stage in names - in_turn


def trainings(workflow: Workflow) -> dict[str, TrainingConfig]:
    return {stage.name: stage.config for stage in workflow.stages if isinstance(stage.config, TrainingConfig)}
