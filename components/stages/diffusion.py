"""Train one diffusion model: the base, an upsampler, or one that works on images."""

from functools import partial
from typing import Any

import torch

from components.configuration.dataset_info import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.data.degradations import Degradation
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.held_out import read_split
from components.data.shards import BPE, ShardIndex, load_index, read_bpe
from components.data.subset import random_part
from components.runtime.storage.artifact import Artifact
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once
from components.stages.context import StageContext
from components.stages.training import check_maker, frozen_networks, train_on_images
from components.training.building import network_arguments
from components.training.frozen import Frozen, LoadEncoder, gray_images, load_latents
from components.training.results import ModelDescription
from components.training.tasks.diffusion import DiffusionTask
from components.training.tasks.image_to_image import ImageToImageTask

MEASURED = 256  # training images that the deviation of latents is measured on


def train_diffusion(
    config: DiffusionTraining,
    context: StageContext,
    *,
    images: Artifact,
    autoencoder: Artifact | None = None,
    contrastive: Artifact | None = None,
    text_encoder: Artifact | None = None,
) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: bundle, metrics and preview.

    Args:
        autoencoder: the model learns its latents in place of images.
        contrastive, text_encoder: make the conditions image_embedding and text_states, where the recipe names them.

    Raises ShardError for a set without the condition images that the recipe names, ValueError for networks that do
    not fit, both before anything is started; TrainingError if losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    resolution = config.data.resolution if autoencoder is None else resolution_of_latents(index, autoencoder)
    encoders: dict[str, Any] = {"contrastive": contrastive, "text_encoder": text_encoder}
    frozen, arrays = frozen_networks(config.conditioning.conditions, images, index, resolution=resolution, **encoders)
    check_sizes(config, frozen.sizes)
    learned = settings_of(config, index.classes)
    if autoencoder is not None:
        load, scale = latents_of(config, context, index, autoencoder)
        frozen, learned = Frozen((*frozen.load_encoders, load), frozen.sizes), learned | {"latent_scale": scale}
        arrays = (*arrays, *({"latents"} & {*index.array_names}))
    elif config.data.in_channels == 1:
        frozen = Frozen((*frozen.load_encoders, gray_images), frozen.sizes)
    dataset_info = DatasetInfo(
        num_classes=len(index.classes),
        vocab_size=index.text.vocab_size,
        text_length=index.text.text_length,
        **frozen.sizes,
    )
    texts = {BPE: read_bpe(index)} if "text" in config.conditioning.conditions else {}
    model = ModelDescription(config.network.kind, network_arguments(config, dataset_info), learned, texts=texts)
    task, degradation = DiffusionTask, None
    if config.degradation is not None:
        task, damaged = ImageToImageTask, config.degradation
        degradation = Degradation(config.optimization.seed, damaged.tasks, damaged.jpeg_qualities)
    return train_on_images(
        task,
        config,
        context,
        index,
        resolution=resolution,
        model=model,
        condition_member=config.conditioning.condition_member,
        degradation=degradation,
        arrays=arrays,
        dataset_info=dataset_info,
        load_encoders=frozen.load_encoders,
    )


def settings_of(config: DiffusionTraining, classes: tuple[str, ...]) -> dict[str, Any]:
    """What a sampler must know of the training; plain values, they go into the bundle."""
    settings: dict[str, Any] = {
        "role": "base",
        "resolution": config.data.resolution,
        "objective": config.process.objective(),
        "classes": list(classes),
    }
    if config.conditioning.condition_member is not None:
        settings["condition_member"] = config.conditioning.condition_member
    if config.low_res is not None:
        settings |= {"role": "upsampler", **config.low_res.model_dump()}
    if config.degradation is not None:
        settings |= {"role": "image_to_image", **config.degradation.model_dump(mode="json", exclude={"jpeg_qualities"})}
    return settings


def latents_of(
    config: DiffusionTraining, context: StageContext, index: ShardIndex, autoencoder: Artifact
) -> tuple[LoadEncoder, float]:
    """The encoder of latents and its scale: one over the deviation of the latents of training images (Rombach et al.,
    2022, appendix G). Raises ValueError if the recipe's sizes are not theirs."""
    shape = describe_autoencoder(autoencoder).diffused_shape
    wanted = (config.data.in_channels, config.data.resolution, config.data.resolution)
    if shape != wanted:
        raise ValueError(f"latents are {shape} (channels, height, width), the recipe's in_channels and sides {wanted}")
    part = random_part(index, samples=MEASURED, seed=config.optimization.seed)
    with context.pool() as pool:
        scale = 1 / pool.call(partial(deviation_of_latents, part, autoencoder, samples=MEASURED))
    return partial(load_latents, autoencoder=autoencoder, scale=scale), scale


def deviation_of_latents(index: ShardIndex, autoencoder: Artifact, *, samples: int) -> float:
    """Standard deviation of the latents of the first training images, read where the set has them. Runs in a worker."""
    network, device = open_autoencoder(autoencoder), best_device()
    if "latents" in index.array_names:
        made = read_split(index, "train", resolution=network.grid[0], limit=samples, arrays=["latents"])
        return float(torch.from_numpy(made.arrays["latents"]).float().std())
    image = from_uint8(read_split(index, "train", resolution=network.resolution, limit=samples).image)
    network = network.to(device)
    batches = image.split(most_at_once(network.resolution))
    return float(torch.cat([network.to_latents(batch.to(device)).cpu() for batch in batches]).std())


def resolution_of_latents(index: ShardIndex, autoencoder: Artifact) -> int:
    """Side of the images to read: what the autoencoder takes, or, next to latents, what the set keeps.

    Raises ValueError if the set's latents are of another autoencoder.
    """
    if "latents" not in index.array_names:
        return describe_autoencoder(autoencoder).resolution
    check_maker(index, "latents", autoencoder)
    assert index.resolution is not None  # precompute decided it
    return index.resolution


def check_sizes(config: DiffusionTraining, made: dict[str, int]) -> None:
    """Raises ValueError if the recipe says another size of a condition than its encoder makes."""
    for name, size in made.items():
        if getattr(config.conditioning, name, None) not in (None, size):
            raise ValueError(
                f"{name} is {getattr(config.conditioning, name)} in the recipe, but its encoder makes {size}"
            )
