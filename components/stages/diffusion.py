"""Train one diffusion model: the base, an upsampler, or one that works on pictures."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from components.data.degradations import Degradation
from components.data.shards import BPE, ShardIndex, load_index, read_bpe
from components.data.subset import read_random_part
from components.models.autoencoder import Autoencoder
from components.stages.context import StageContext
from components.stages.training import check_maker, frozen_networks, train_on_pictures
from components.storage.artifact import Artifact
from components.training.batches import to_image
from components.training.config import Conditions, DiffusionConfig
from components.training.diffusion_settings import network_arguments, network_kind, sampling_settings
from components.training.frozen import Frozen, load_latents, open_autoencoder
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
    resolution = config.resolution if autoencoder is None else resolution_of_latents(index, autoencoder)
    encoders: dict[str, Any] = {"contrastive": contrastive, "text_encoder": text_encoder}
    frozen, arrays = frozen_networks(config.conditions, images, index, resolution=resolution, **encoders)
    check_sizes(config, frozen.sizes)
    learned = sampling_settings(config, index.classes)
    if autoencoder is not None:
        frozen, learned = with_latents(frozen, learned, config, index, autoencoder)
        arrays = (*arrays, *({"latents"} & {*index.array_names}))
    offers = Conditions(
        num_classes=len(index.classes),
        vocab_size=index.text.vocab_size,
        text_length=index.text.text_length,
        **frozen.sizes,
    )
    how: dict[str, Any] = {"condition_member": config.condition_member, "offers": offers, "resolution": resolution}
    how |= {"load_encoders": frozen.load_encoders, "arrays": arrays}
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
    scale = 1 / float(measured_latents(index, network, seed=config.seed).std())
    load = partial(load_latents, autoencoder=autoencoder, scale=scale)
    return Frozen((*frozen.load_encoders, load), frozen.sizes), learned | {"latent_scale": scale}


def measured_latents(index: ShardIndex, network: Autoencoder, *, seed: int) -> Tensor:
    """(MEASURED, C, h, w) of training pictures drawn by the seed, read where the set has them."""
    how: dict[str, Any] = {"samples": MEASURED, "seed": seed}
    if "latents" in index.array_names:
        part = read_random_part(index, **how, resolution=network.grid[0], arrays=["latents"])
        return torch.from_numpy(part.arrays["latents"]).float()
    part = read_random_part(index, **how, resolution=network.resolution)
    return network.to_latents(to_image(torch.from_numpy(part.image)))


def resolution_of_latents(index: ShardIndex, autoencoder: Artifact) -> int:
    """Side of the pictures to read: what the autoencoder takes, or, beside latents, what the set keeps.

    Raises ValueError if the set's latents are of another autoencoder.
    """
    if "latents" not in index.array_names:
        return open_autoencoder(autoencoder).resolution
    check_maker(index, "latents", autoencoder)
    assert index.resolution is not None  # precompute decided it
    return index.resolution


def check_sizes(config: DiffusionConfig, made: dict[str, int]) -> None:
    """Raises ValueError if the recipe says another size of a condition than its encoder makes."""
    for name, size in made.items():
        if getattr(config, name, None) not in (None, size):
            raise ValueError(f"{name} is {getattr(config, name)} in the recipe, but its encoder makes {size}")
