"""Train the prior over tokens."""

from collections.abc import Iterator
from functools import partial

from components.data.shards import BPE
from components.data.tokens import TokenSet, join_tokens, parse_tokens, select_split, token_batches
from components.models.autoencoder import VQAutoencoder
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.storage.bundle import load_bundle
from components.training.config import Conditions, PriorConfig, TokenGrid
from components.training.launch import RankStream, train
from components.training.loop import Arrays
from components.training.results import write_model
from components.training.tasks.prior import PriorTask, transformer_arguments

HELD_OUT = 2048  # pictures for previews and the final evaluation


def train_prior(
    config: PriorConfig, context: StageContext, *, tokens: Artifact, tokenizer: Artifact | None = None
) -> Artifact:
    """Train on `tokens`. Returns a model artifact: bundle, metrics and, where `tokenizer` is given, a preview.

    Raises TrainingError if the losses stop being finite or workers fail too often.
    """
    about = tokens.metadata
    offers = Conditions(num_classes=len(about["classes"]), **about["text"])
    grid = TokenGrid(codebook_size=about["codebook_size"], height=about["grid"][0], width=about["grid"][1])
    make_task = partial(
        PriorTask,
        config,
        offers=offers,
        grid=grid,
        load_tokenizer=None if tokenizer is None else partial(open_tokenizer, tokenizer, context),
        max_batch_per_device=context.resources.max_batch_per_device,
    )
    state = train(
        make_task,
        config=config,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=RankStream(partial(rank_tokens, tokens, config)),
        held_out=partial(held_out_tokens, tokens),
        recorder=context.recorder,
        resources=context.resources,
        scratch=context.scratch(),
    )
    folder, network = context.scratch(), transformer_arguments(config, offers, grid)
    sampled = config.model_dump(include={"guidance_scale", "temperature", "top_k", "top_p"})
    settings = {"grid": about["grid"], "classes": about["classes"], **sampled}
    summary = write_model(state, folder, kind="prior", network=network, settings=settings)
    if "text" in config.conditions:
        (folder / BPE).write_bytes(tokens.read(BPE))
    return context.commit("model", folder=folder, metadata={"summary": summary})


def read_tokens(tokens: Artifact) -> TokenSet:
    return join_tokens([parse_tokens(tokens.read(name), name) for name in tokens.metadata["names"]])


def rank_tokens(
    tokens: Artifact, config: PriorConfig, *, rank: int, world_size: int, start_step: int
) -> Iterator[Arrays]:
    return token_batches(
        select_split(read_tokens(tokens), "train"),
        global_batch_size=config.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        start_step=start_step,
        total_steps=config.total_steps,
    )


def held_out_tokens(tokens: Artifact) -> Arrays:
    """The held-out split; the first pictures of the whole set if there is none."""
    samples = read_tokens(tokens)
    held_out = select_split(samples, "holdout")
    chosen = held_out if held_out.key else samples
    return {name: getattr(chosen, name)[:HELD_OUT] for name in ("tokens", "label", "text")}


def open_tokenizer(tokenizer: Artifact, context: StageContext) -> VQAutoencoder:
    network = load_bundle(tokenizer.download(context.scratch())).module
    assert isinstance(network, VQAutoencoder)
    return network
