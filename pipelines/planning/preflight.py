"""What a workflow needs of this machine and of the nodes that work, asked before anything starts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from components.configuration.config import Config
from components.configuration.optimization import Training
from components.configuration.trainings import AnyTraining, AutoencoderTraining
from components.configuration.usage import UsageError
from components.data.ingest import PACKAGED
from components.data.listing import FileVersion
from components.data.source_check import check_file, check_source, detect_source, file_to_try
from components.evaluation.features import FeatureNetworkError, check_feature_network
from components.evaluation.measure import MeasureConfig
from components.runtime.execution import Resources
from components.sampling.frozen_text import FrozenTextError, check_transformers
from components.stages.images import ImagesConfig, shard_in_place
from components.stages.text_encoder import TextEncoderConfig, check_text_encoder
from components.training.perceptual_weights import PerceptualWeightsError, check_perceptual_network
from components.training.sharding import why_whole
from pipelines.workflow import PlannedStage, Workflow


class Needs(NamedTuple):
    """What stages need wherever they work."""

    configs: tuple[Config, ...] = ()
    packaged: str | None = None  # the source that is read, where packages make it
    source: FileVersion | None = None  # a file of any other source, by its absolute URL
    pretrained_text: bool = False  # whether a pretrained text encoder is loaded

    def addresses(self) -> list[str]:
        """Where they say that something is, as it is written there."""
        found = [] if self.source is None else [self.source.path]
        for config in self.configs:
            if isinstance(config, AutoencoderTraining) and config.losses.perceptual_weights_uri:
                found.append(config.losses.perceptual_weights_uri)
            if isinstance(config, TextEncoderConfig):
                found.append(config.uri)
        return found


def needs_of(workflow: Workflow, planned: Sequence[PlannedStage]) -> Needs:
    """What the stages need that are to run; of what is cached, only what they read of it elsewhere."""
    wanted = {entry.stage.name for entry in planned if entry.wanted}
    read = wanted.union(*(workflow.before(name) for name in wanted))
    used = [entry for entry in planned if entry.stage.name in read]
    return _source_needs(used)._replace(
        configs=tuple(entry.stage.config for entry in planned if entry.wanted),
        pretrained_text=any(isinstance(entry.stage.config, TextEncoderConfig) for entry in used),
    )


def _source_needs(used: Sequence[PlannedStage]) -> Needs:
    """Of the images: their source, or, once they are ingested, the tars that stay where the user has them."""
    for entry in used:
        if isinstance(entry.stage.config, ImagesConfig):
            if entry.wanted:
                return needs_of_source(*detect_source(entry.stage.config.source))
            return Needs() if entry.cached is None else Needs(source=shard_in_place(entry.cached))
    return Needs()


def needs_of_source(source: str, path: str | None) -> Needs:
    """What whoever reads a source needs."""
    return Needs(packaged=source) if source in PACKAGED else Needs(source=file_to_try(source, path))


def check_needs(needs: Needs) -> None:
    """Raise UsageError or SourceError, in one line, if something is not here: a package, weights, a text encoder, or
    the source."""
    if needs.packaged is not None:
        check_source(needs.packaged, None)
    if needs.source is not None:
        check_file(needs.source)
    try:
        if needs.pretrained_text:
            check_transformers()
        for config in needs.configs:
            if isinstance(config, AutoencoderTraining) and config.losses.perceptual_weight > 0:
                check_perceptual_network(
                    config.losses.perceptual_network, weights_uri=config.losses.perceptual_weights_uri
                )
            if isinstance(config, MeasureConfig):
                check_feature_network(config.feature_network)
            if isinstance(config, TextEncoderConfig):
                check_text_encoder(config)
    except (PerceptualWeightsError, FeatureNetworkError, FrozenTextError) as error:
        raise UsageError(str(error)) from error


def check_batches(workflow: Workflow, shares: Mapping[str, Resources]) -> None:
    """Raise UsageError if the workers of a training can't share its global batch equally."""
    for name, config in trainings(workflow).items():
        resources = shares.get(name)
        if resources is not None and not resources.worker_counts(config.optimization.global_batch_size):
            least, most, size = resources.min_workers, resources.num_workers, config.optimization.global_batch_size
            workers = most if least is None else f"{least} to {most}"
            raise UsageError(
                f"{name}.global_batch_size {size} can't be shared by {workers} workers; change one of them"
            )


def check_sharding(workflow: Workflow, shares: Mapping[str, Resources]) -> None:
    """Raise UsageError if the profile wants a network in shards that can only be whole."""
    for name, config in trainings(workflow).items():
        assert isinstance(config, AnyTraining)
        if name in shares and shares[name].sharding == "full" and (why := why_whole(config.network.kind)):
            raise UsageError(
                f"{name}: sharding full is not for its {config.network.kind} ({why}); "
                f"add to the profile: stages: {{{name}: {{sharding: none}}}}"
            )


def branches(workflow: Workflow) -> int:
    """How many trainings can run at once: those that wait for no other training."""
    names = trainings(workflow)
    return max(1, sum(not workflow.before(name) & names.keys() for name in names))


def concurrent_trainings(workflow: Workflow, stage: str) -> int:
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


def trainings(workflow: Workflow) -> dict[str, Training]:
    return {stage.name: stage.config for stage in workflow.stages if isinstance(stage.config, Training)}
