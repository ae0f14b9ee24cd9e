"""Train a prior over tokens: the causal transformer, the masked one, a PixelCNN or a Row LSTM."""

from collections.abc import Callable
from functools import partial

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import MaskedPriorTraining, PixelTraining, PriorTraining
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.shards import BPE
from components.data.token_artifacts import (
    check_aligned,
    check_condition,
    check_tokenizer,
    held_out_tokens,
    rank_tokens,
)
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.training.building import network_arguments
from components.training.flops import step_flops
from components.training.launch import train
from components.training.loop import Task
from components.training.results import ModelDescription
from components.training.tasks.masked_prior import MaskedPriorTask
from components.training.tasks.pixels import PixelTask
from components.training.tasks.prior import PriorTask
from components.training.worker import RankStream

AnyPrior = PriorTraining | MaskedPriorTraining | PixelTraining
TASKS: dict[str, Callable[..., Task]] = {
    "transformer": PriorTask,
    "masked_transformer": MaskedPriorTask,
    "pixelcnn": PixelTask,
    "row_lstm": PixelTask,
}


def train_prior(
    config: AnyPrior,
    context: StageContext,
    *,
    tokens: Artifact,
    tokenizer: Artifact | None = None,
    condition: Artifact | None = None,
) -> Artifact:
    """Train on `tokens`. Returns a model artifact: bundle, metrics and, where `tokenizer` is given, a preview.

    `condition` holds tokens of condition images with the same keys. Raises TokensError, before anything is started,
    if the inputs don't fit each other; TrainingError if the losses stop being finite or workers fail too often.
    """
    metadata, grid = tokens.metadata, grid_of(tokens)
    check_condition(condition, wanted="condition" in config.conditioning.conditions)
    if condition is not None:
        with context.pool() as pool:
            pool.call(partial(check_aligned, tokens, condition))
    dataset_info = DatasetInfo(
        num_classes=len(metadata["classes"]),
        condition=None if condition is None else grid_of(condition),
        **metadata["text"],
    )
    if tokenizer is not None:
        network = describe_autoencoder(tokenizer)
        check_tokenizer(tokens, codebook_size=network.codebook_size, grid=network.grid)
    numbers = config.optimization.model_dump(include={"global_batch_size", "seed", "total_steps"})
    settings = {"role": "prior", "grid": metadata["grid"], "classes": metadata["classes"]}
    texts = {BPE: tokens.read(BPE).decode()} if "text" in config.conditioning.conditions else {}
    trained = train(
        partial(
            TASKS[config.network.kind],
            config,
            dataset_info=dataset_info,
            grid=grid,
            load_tokenizer=None if tokenizer is None else partial(open_autoencoder, tokenizer),
        ),
        config=config.optimization,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=RankStream(partial(rank_tokens, tokens, condition, **numbers)),
        held_out=partial(held_out_tokens, tokens, condition),
        recorder=context.recorder,
        resources=context.resources,
        store=context.store,
        model=ModelDescription(
            config.network.kind, network_arguments(config, dataset_info, grid), settings, texts=texts
        ),
        step_flops=partial(step_flops, config, dataset_info, grid=grid),
    )
    return context.commit("model", entries=trained.entries, metadata={"summary": trained.summary})


def grid_of(tokens: Artifact) -> TokenGrid:
    height, width = tokens.metadata["grid"]
    return TokenGrid(codebook_size=tokens.metadata["codebook_size"], height=height, width=width)
