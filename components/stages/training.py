"""Training of a model of any family of `components.configuration.families`, on images or on tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.data.decoded import ImageSamples
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.held_out import held_out_arrays
from components.data.images import Degradation
from components.data.shards import BPE, check_member, load_index, read_bpe
from components.data.stream import Samples, rank_batches
from components.data.tokens import TokenSamples, check_condition, check_tokenizer, held_out_tokens
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.training.frozen import FrozenNetworks, image_inputs
from components.training.launch import train
from components.training.loop import Arrays
from components.training.results import ModelDescription, copy_start
from components.training.step_model import step_flops, task_maker
from components.training.worker import TrainingJob
from components.weights.perceptual import check_perceptual_network
from components.weights.starts import SCALE, open_start, start_loader

HELD_OUT = 256  # images for previews and the final evaluation


def train_model(
    config: Training,
    context: StageContext,
    *,
    images: Artifact | None = None,
    autoencoder: Artifact | None = None,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
    tokens: Artifact | None = None,
    tokenizer: Artifact | None = None,
    condition: Artifact | None = None,
) -> Artifact:
    """Trains on `images` or on `tokens`, or takes a model as it is (`init_from.frozen`).
    Returns a model artifact: bundle, metrics and maybe a preview.

    Args:
        autoencoder: the model learns its latents in place of images.
        contrastive, text_encoder: make the arrays `image_embedding`, `text_states` and `text_embedding` that the
            training needs and that the images do not hold.
        tokenizer: turns tokens into images, for previews; None: there are none.
        condition: tokens of condition images with the same keys.

    Raises before anything is started: PerceptualWeightsError, ShardError for a set without the member that the recipe
    names, TokensError and ValueError for inputs, or weights to start from, that do not fit each other or the recipe.
    Raises TrainingError if losses stop being finite or workers fail too often."""
    if tokens is not None:
        return train_on_tokens(config, context, tokens, tokenizer=tokenizer, condition=condition)
    if images is None:
        raise ValueError("a training needs images or tokens")
    return train_on_images(config, context, images, FrozenNetworks(autoencoder, contrastive, text_encoder))


def train_on_images(config: Training, context: StageContext, images: Artifact, networks: FrozenNetworks) -> Artifact:
    """Trains on images in the order of the set; arguments and errors are as in `train_model`."""
    needs = config.needs()
    if needs.resolution is None:
        raise ValueError("a model of pixels needs a resolution; only one of tokens goes without")
    if config.trains:
        check_perceptual_network(needs.perceptual_network, weights_uri=needs.perceptual_weights_uri)
    index = load_index(images.url("index.json"))
    for member in (needs.member, needs.condition_member):
        if member is not None:
            check_member(index, member)
    if needs.mask_values not in (None, index.mask_values):
        raise ValueError(f"masks of {index.mask_values} values need image_channels={index.mask_values} in the recipe")
    scale = degradation = None
    if config.init_from is not None:
        scale = open_start(config.init_from).model.settings.get(SCALE)  # which the start has learned
    inputs = image_inputs(config, context.pool, images, index, networks, latent_scale=scale)
    if needs.degradations:
        degradation = Degradation(config.optimization.seed, needs.degradations, needs.jpeg_qualities)
    return run_training(
        config,
        context,
        ImageSamples(index, inputs.view, degradation),
        partial(held_out_arrays, index, inputs.view, degradation=degradation, limit=HELD_OUT),
        dataset_info=inputs.dataset_info,
        settings=config.settings(tuple(index.classes)) | inputs.settings,
        texts={BPE: read_bpe(index)} if needs.captions else {},
        prompts=index.text.examples,
        load_encoders=inputs.load_encoders,
    )


def train_on_tokens(
    config: Training, context: StageContext, tokens: Artifact, *, tokenizer: Artifact | None, condition: Artifact | None
) -> Artifact:
    """Trains on tokens in the order of the set; arguments and errors are as in `train_model`."""
    metadata, grid, load_tokenizer = tokens.metadata, grid_of(tokens), None
    check_condition(tokens, condition, wanted="condition" in config.needs().columns)
    dataset_info = DatasetInfo(
        num_classes=len(metadata["classes"]),
        condition=None if condition is None else grid_of(condition),
        **metadata["text"],
    )
    if tokenizer is not None:
        network = describe_autoencoder(tokenizer)
        check_tokenizer(tokens, codebook_size=network.codebook_size, grid=network.grid)
        load_tokenizer = partial(open_autoencoder, tokenizer)
    return run_training(
        config,
        context,
        TokenSamples(tokens, condition),
        partial(held_out_tokens, tokens, condition),
        dataset_info=dataset_info,
        grid=grid,
        settings=config.settings(tuple(metadata["classes"]), grid),
        texts={BPE: tokens.read(BPE).decode()} if config.needs().captions else {},
        prompts=metadata.get("examples", ()),
        load_tokenizer=load_tokenizer,
    )


def run_training(
    config: Training,
    context: StageContext,
    samples: Samples,
    held_out: Callable[[], Arrays],
    *,
    dataset_info: DatasetInfo,
    settings: dict[str, Any],
    texts: dict[str, str],
    prompts: Sequence[str],
    grid: TokenGrid | None = None,
    **loaders: Any,
) -> Artifact:
    """Trains and commits a model; arguments as of `task_maker`, `TrainingJob` and `ModelDescription`."""
    model = ModelDescription(
        config.network.kind,
        config.network_arguments(dataset_info, grid),
        settings | ({"prompts": [*prompts]} if texts and prompts else {}),
        learner=family_of(config.network.kind).stored,
        adapter=config.adapter,
        new_modules=() if config.init_from is None else config.init_from.ignore,
        texts=texts,
    )
    load_start = start_loader(config, dataset_info, grid, bpe=texts.get(BPE))
    if config.init_from is not None and not config.trains:
        with context.pool() as pool:
            kept = pool.call(partial(copy_start, open_start(config.init_from), model, context.store))
        return context.commit("model", entries=kept.entries, metadata={"summary": kept.summary})
    optimization = config.optimization
    stream = partial(
        rank_batches,
        samples,
        global_batch_size=optimization.global_batch_size,
        seed=optimization.seed,
        streams=optimization.streams,
        total_steps=optimization.total_steps,
        threads=context.resources.reader_threads,
    )
    job = TrainingJob(
        task_maker(config, dataset_info, grid=grid, **loaders),
        config=optimization,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=stream,
        held_out=held_out,
        recorder=context.recorder,
        resources=context.resources,
        store=context.store,
        model=model,
        load_start=load_start,
        step_flops=partial(step_flops, config, dataset_info, grid=grid),
    )
    trained = train(job)
    return context.commit("model", entries=trained.entries, metadata={"summary": trained.summary})


def grid_of(tokens: Artifact) -> TokenGrid:
    """The codebook and the grid of a set of tokens."""
    height, width = tokens.metadata["grid"]
    return TokenGrid(codebook_size=tokens.metadata["codebook_size"], height=height, width=width)
