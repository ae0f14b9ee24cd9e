"""Train the class-conditional GAN."""

from components.configuration.dataset_info import DatasetInfo
from components.configuration.trainings import GANTraining
from components.data.shards import load_index
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.training.building import network_arguments
from components.training.results import ModelDescription
from components.training.tasks.gan import GANTask


def train_gan(config: GANTraining, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: the generator's bundle, metrics and preview.

    Raises TrainingError if the losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(num_classes=len(index.classes))
    settings = {"resolution": config.data.resolution, "classes": list(index.classes)}
    model = ModelDescription("gan", network_arguments(config, dataset_info), settings, learner="generator.")
    return train_on_images(GANTask, config, context, index, model=model, dataset_info=dataset_info)
