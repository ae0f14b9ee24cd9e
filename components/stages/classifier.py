"""Train a classifier: of noisy images, for guidance, or of clean ones, as a judge."""

from components.configuration.dataset_info import DatasetInfo
from components.configuration.trainings import ClassifierTraining
from components.data.shards import load_index
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.training.building import network_arguments
from components.training.results import ModelDescription
from components.training.tasks.classifier import ClassifierTask


def train_classifier(config: ClassifierTraining, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images and labels of `images`. Returns a model artifact: bundle and metrics.

    Raises TrainingError if the losses stop being finite or workers fail too often.
    """
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(num_classes=len(index.classes))
    settings = {
        "role": "classifier",
        "resolution": config.data.resolution,
        "noisy": config.noisy,
        "objective": config.process.objective(),
        "classes": list(index.classes),
    }
    model = ModelDescription("classifier", network_arguments(config, dataset_info), settings)
    return train_on_images(ClassifierTask, config, context, index, model=model, dataset_info=dataset_info)
