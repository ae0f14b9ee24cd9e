"""Train a model of raw pixels: gated PixelCNN or Row LSTM."""

from typing import Any

from components.data.shards import load_index
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.storage.artifact import Artifact
from components.training.config import DatasetInfo, PixelConfig
from components.training.results import ModelDescription
from components.training.tasks.pixels import PixelTask, pixel_arguments


def train_pixels(config: PixelConfig, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises ValueError if the recipe names no resolution, TrainingError if the losses stop being finite or workers fail
    too often.
    """
    if config.resolution is None:
        raise ValueError("a model of pixels needs a resolution; only one of tokens goes without")
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(num_classes=len(index.classes))
    network = pixel_arguments(config, dataset_info, None)
    model = ModelDescription(config.network, network, settings(config, index.classes))
    return train_on_images(PixelTask, config, context, index, model=model, dataset_info=dataset_info)


def settings(config: PixelConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What sampling needs to know."""
    sampled = config.model_dump(include={"resolution", "guidance_scale", "temperature", "top_k", "top_p"})
    return {"classes": list(classes), **sampled}
