"""Train one diffusion model: the base, an upsampler, or one that works on pictures."""

from functools import partial
from typing import Any

import torch

from components.data.degradations import Degradation
from components.data.shards import BPE, ShardIndex, load_index, read_bpe
from components.data.subset import read_random_part
from components.stages.context import StageContext
from components.stages.training import train_on_pictures
from components.storage.artifact import Artifact
from components.training.batches import to_image
from components.training.config import Conditions, DiffusionConfig
from components.training.diffusion_settings import network_arguments, network_kind, sampling_settings
from components.training.frozen import Frozen, frozen_encoders, load_latents, open_autoencoder
from components.training.image_to_image_config import ImageToImageConfig
from components.training.results import write_model
from components.training.tasks.diffusion import DiffusionTask
from components.training.tasks.image_to_image import ImageToImageTask

MEASURED = 256  # pictures that the deviation of latents is measured on


def train_diffusion(
    config: DiffusionConfig,
    context: StageContext,
    *,
    images: Artifact,
    autoencoder: Artifact | None = None,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> Artifact:
    """Train on the pictures of `images`. Returns a model artifact: bundle, metrics and preview.

    Args:
        autoencoder: the model learns its latents in place of pictures.
        contrastive, text_encoder: make the conditions image_embedding and text_states, where the recipe names them.

    Raises ShardError for a set without the condition pictures that the recipe names, ValueError for networks that do
    not fit, both before anything is started; TrainingError if losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    resolution = config.resolution if autoencoder is None else open_autoencoder(autoencoder).resolution
    frozen = frozen_encoders(
        config.conditions,
        resolution=resolution,
        bpe=read_bpe(index),
        contrastive=contrastive,
        text_encoder=text_encoder,
    )
    check_sizes(config, frozen.sizes)
    learned = sampling_settings(config, index.classes)
    if autoencoder is not None:
        frozen, learned = with_latents(frozen, learned, config, index, autoencoder)
    offers = Conditions(
        num_classes=len(index.classes),
        vocab_size=index.text.vocab_size,
        text_length=index.text.text_length,
        **frozen.sizes,
    )
    how: dict[str, Any] = {"condition_member": config.condition_member, "offers": offers, "resolution": resolution}
    how["load_encoders"] = frozen.load_encoders
    if isinstance(config, ImageToImageConfig):
        degradation = Degradation(config.seed, config.tasks, config.jpeg_qualities)
        state = train_on_pictures(ImageToImageTask, config, context, index, degradation=degradation, **how)
    else:
        state = train_on_pictures(DiffusionTask, config, context, index, **how)
    folder, kind, network = context.scratch(), network_kind(config), network_arguments(config, offers)
    summary = write_model(state, folder, kind=kind, network=network, settings=learned)
    if "text" in config.conditions:
        (folder / BPE).write_text(read_bpe(index))
    return context.commit("model", folder=folder, metadata={"summary": summary})


def with_latents(
    frozen: Frozen, learned: dict[str, Any], config: DiffusionConfig, index: ShardIndex, autoencoder: Artifact
) -> tuple[Frozen, dict[str, Any]]:
    """The encoders with that of latents, and the settings with its scale: one over the deviation of the latents of
    training pictures (Rombach et al., 2022, appendix G). Raises ValueError if the recipe's sizes are not theirs."""
    network = open_autoencoder(autoencoder)
    shape, wanted = network.diffused_shape, (config.in_channels, config.resolution, config.resolution)
    if shape != wanted:
        raise ValueError(f"latents are {shape} (channels, height, width), the recipe's in_channels and sides {wanted}")
    pictures = read_random_part(index, samples=MEASURED, seed=config.seed, resolution=network.resolution).image
    scale = 1 / float(network.to_latents(to_image(torch.from_numpy(pictures))).std())
    load = partial(load_latents, autoencoder=autoencoder, scale=scale)
    return Frozen((*frozen.load_encoders, load), frozen.sizes), learned | {"latent_scale": scale}


def check_sizes(config: DiffusionConfig, made: dict[str, int]) -> None:
    """Raises ValueError if the recipe says another size of a condition than its encoder makes."""
    for name, size in made.items():
        if getattr(config, name, None) not in (None, size):
            raise ValueError(f"{name} is {getattr(config, name)} in the recipe, but its encoder makes {size}")
