"""Train the class-conditional GAN."""

from components.data.shards import load_index
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.storage.artifact import Artifact
from components.training.config import DatasetInfo, GANConfig
from components.training.results import ModelDescription
from components.training.tasks.gan import GANTask, generator_arguments


def train_gan(config: GANConfig, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: the generator's bundle, metrics and preview.

    Raises TrainingError if the losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(num_classes=len(index.classes))
    settings = {"resolution": config.resolution, "classes": list(index.classes)}
    model = ModelDescription("gan", generator_arguments(config, dataset_info), settings, learner="generator.")
    return train_on_images(GANTask, config, context, index, model=model, dataset_info=dataset_info)
