"""Train a model of raw pixels: gated PixelCNN or Row LSTM."""

from components.configuration.dataset_info import DatasetInfo
from components.configuration.trainings import PixelTraining
from components.data.shards import load_index
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.training.building import network_arguments
from components.training.results import ModelDescription
from components.training.tasks.pixels import PixelTask


def train_pixels(config: PixelTraining, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises ValueError if the recipe names no resolution, TrainingError if the losses stop being finite or workers fail
    too often.
    """
    if config.data.resolution is None:
        raise ValueError("a model of pixels needs a resolution; only one of tokens goes without")
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(num_classes=len(index.classes))
    settings = {"classes": list(index.classes), "resolution": config.data.resolution}
    model = ModelDescription(config.network.kind, network_arguments(config, dataset_info), settings)
    return train_on_images(PixelTask, config, context, index, model=model, dataset_info=dataset_info)
