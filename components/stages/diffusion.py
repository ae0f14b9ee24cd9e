"""Train one diffusion model: the base, an upsampler, or one that works on pictures."""

from typing import Any

from components.data.degradations import Degradation
from components.data.shards import BPE, load_index, read_bpe
from components.stages.context import StageContext
from components.stages.training import train_on_pictures
from components.storage.artifact import Artifact
from components.training.config import Conditions, DiffusionConfig
from components.training.image_to_image_config import ImageToImageConfig
from components.training.results import write_model
from components.training.tasks.diffusion import (
    DiffusionTask,
    low_res_schedule_settings,
    network_arguments,
    network_kind,
    objective_settings,
)
from components.training.tasks.image_to_image import ImageToImageTask


def train_diffusion(config: DiffusionConfig, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the pictures of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises ShardError for a set without the condition pictures that the recipe names, before anything is started;
    TrainingError if the losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    offers = Conditions(
        num_classes=len(index.classes), vocab_size=index.text.vocab_size, text_length=index.text.text_length
    )
    how: dict[str, Any] = {"condition_member": config.condition_member, "offers": offers}
    if isinstance(config, ImageToImageConfig):
        degradation = Degradation(config.seed, config.tasks, config.jpeg_qualities)
        state = train_on_pictures(ImageToImageTask, config, context, index, degradation=degradation, **how)
    else:
        state = train_on_pictures(DiffusionTask, config, context, index, **how)
    folder, kind, network = context.scratch(), network_kind(config), network_arguments(config, offers)
    summary = write_model(state, folder, kind=kind, network=network, settings=settings(config, index.classes))
    if "text" in config.conditions:
        (folder / BPE).write_text(read_bpe(index))
    return context.commit("model", folder=folder, metadata={"summary": summary})


def settings(config: DiffusionConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What sampling needs to know."""
    base = {
        "role": "base" if config.low_res_resolution is None else "upsampler",
        "resolution": config.resolution,
        "objective": objective_settings(config),
        "sampler": config.sampler,
        "num_inference_steps": config.num_inference_steps,
        "eta": config.eta,
        "spacing": config.spacing,
        "threshold": config.threshold,
        "threshold_percentile": config.threshold_percentile,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": config.guidance_interval and list(config.guidance_interval),
        "guidance_rescale": config.guidance_rescale,
        "classes": list(classes),
    }
    if isinstance(config, ImageToImageConfig):
        learned = {"tasks": list(config.tasks), "factors": list(config.super_resolution_factors)}
        return base | {"role": "image_to_image", "hole_area": list(config.hole_area)} | learned
    if config.condition_member is not None:
        base |= {"condition_member": config.condition_member}
    if config.low_res_resolution is None:
        return base
    return base | {
        "low_res_resolution": config.low_res_resolution,
        "low_res_schedule": low_res_schedule_settings(config),
        "noise_level": config.noise_level,
    }
