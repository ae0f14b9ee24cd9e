"""The room that a run's checkpoints need, asked before anything starts."""

import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import AnyTraining, AutoencoderTraining, ContrastiveTraining
from components.runtime.storage.connection import check_room, is_local
from components.runtime.storage.store import Store
from components.stages.images import ImagesConfig
from components.training.launch import CHECKPOINTS_KEPT
from components.training.sizes import Sizes, autoencoder_grid, training_sizes
from pipelines.planning.preflight import branches
from pipelines.workflow import PlannedStage, Stage, Workflow

IN_FLIGHT = 1  # written while those that are kept are still there
MANY_CLASSES = 1000  # of a set that nobody has counted yet; each is a row of an embedding
FROZEN_DIM, FROZEN_LENGTH = 1024, 77  # of a pretrained encoder that nobody has loaded yet


class Space(NamedTuple):
    """Bytes."""

    storage: int = 0  # what checkpoints add to storage, and models in the end
    temporary: int = 0  # what checkpoints, and models in the end, may take in one node's temporary folder
    trainings: tuple[str, ...] = ()

    def check(self, *, root: Store | None, works: bool) -> None:
        """Raise StoreError, in one line, if there is no room for it here.

        Args:
            root: storage; None: it is not asked. An object store has room.
            works: whether trainings may write their checkpoints on this node.
        """
        places = {} if root is None else {root.uri: self.storage}
        places |= {tempfile.gettempdir(): self.temporary} if works else {}
        check_room(places, purpose=f"the checkpoints of {', '.join(self.trainings)}")


def space_of(workflow: Workflow, planned: Sequence[PlannedStage]) -> Space:
    """The room that the trainings need that are to run, but for what earlier tries left in storage.

    All of them may write at once on one node, as far as none waits for another. Each has one checkpoint there at a
    time: the next is written when that is in storage, and ranks that resume fetch one between them. In the end it is
    the model, with its snapshots.
    """
    storage, temporary = 0, {}
    for entry in planned:
        if entry.wanted and isinstance(entry.stage.config, AnyTraining):
            sizes = _sizes(entry.stage, entry.stage.config, planned)
            here = is_local(entry.store.uri)
            tries = [name for name in entry.store.folders() if name.partition("-")[0] == "train"] if here else []
            there = sum(info.bytes for name in tries for info in entry.store.list(name))
            storage += max(0, (CHECKPOINTS_KEPT + IN_FLIGHT) * sizes.checkpoint + sizes.model - there)
            temporary[entry.stage.name] = max(sizes.checkpoint, sizes.model)
    largest = sorted(temporary.values(), reverse=True)[: branches(workflow)]
    return Space(storage, sum(largest), tuple(temporary))


def _sizes(stage: Stage, config: AnyTraining, planned: Sequence[PlannedStage]) -> Sizes:
    images = next(entry.cached for entry in planned if isinstance(entry.stage.config, ImagesConfig))
    classes = MANY_CLASSES if images is None else len(images.metadata["classes"])
    assumed = assumed_dataset_info(stage, [entry.stage for entry in planned], classes=classes)
    return training_sizes(config, assumed, grid=tokens_of(stage, "tokens"))


def tokens_of(stage: Stage, name: str) -> TokenGrid | None:
    """The tokens that a stage is given under this name; None if it is given none."""
    tokens = stage.inputs.get(name)
    tokenizer = tokens.inputs.get("tokenizer") if isinstance(tokens, Stage) else None
    config = tokenizer.config if isinstance(tokenizer, Stage) else None
    return autoencoder_grid(config) if isinstance(config, AutoencoderTraining) else None


def assumed_dataset_info(stage: Stage, stages: Sequence[Stage], *, classes: int = MANY_CLASSES) -> DatasetInfo:
    """What the set conditions on, as far as it is known: where it is not, more than it will be."""
    images = next(other.config for other in stages if isinstance(other.config, ImagesConfig))
    contrastive = next((other.config for other in stages if isinstance(other.config, ContrastiveTraining)), None)
    text_length = images.text_length
    return DatasetInfo(
        num_classes=classes,
        vocab_size=images.vocab_size,
        text_length=text_length,
        condition=tokens_of(stage, "condition"),
        image_embedding_dim=FROZEN_DIM if contrastive is None else contrastive.network.embedding_dim,
        text_states_dim=FROZEN_DIM if contrastive is None else contrastive.text.text_dim,
        text_states_length=FROZEN_LENGTH if contrastive is None else text_length,
    )
