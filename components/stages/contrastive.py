"""Train a contrastive text-image encoder."""

from components.configuration.dataset_info import DatasetInfo
from components.configuration.trainings import ContrastiveTraining
from components.data.shards import BPE, load_index, read_bpe
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.training.building import network_arguments
from components.training.results import ModelDescription
from components.training.tasks.contrastive import ContrastiveTask


def train_contrastive(config: ContrastiveTraining, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images and captions of `images`. Returns a model artifact: bundle, text tokenizer and metrics.

    Raises ValueError, before anything is started, for a set without captions; TrainingError later.
    """
    index = load_index(images.url("index.json"))
    dataset_info = DatasetInfo(
        num_classes=len(index.classes), vocab_size=index.text.vocab_size, text_length=index.text.text_length
    )
    network, settings = (
        network_arguments(config, dataset_info),
        {"role": "contrastive", "resolution": config.data.resolution},
    )
    model = ModelDescription("contrastive", network, settings, texts={BPE: read_bpe(index)})
    return train_on_images(ContrastiveTask, config, context, index, model=model, dataset_info=dataset_info)
