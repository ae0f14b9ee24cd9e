"""Train DALL-E 2's diffusion prior over the embeddings of a contrastive encoder."""

from components.configuration.dataset_info import DatasetInfo
from components.configuration.trainings import DiffusionPriorTraining
from components.data.shards import BPE, load_index, read_bpe
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import frozen_networks, train_on_images
from components.training.building import network_arguments
from components.training.results import ModelDescription
from components.training.tasks.diffusion_prior import DiffusionPriorTask


def train_diffusion_prior(
    config: DiffusionPriorTraining, context: StageContext, *, images: Artifact, contrastive: Artifact
) -> Artifact:
    """Train on the images and captions of `images` as `contrastive` sees them. Returns a model artifact.

    Raises ValueError, before anything is started, if that is no contrastive encoder, or sees larger images or texts
    of another tokenizer; TrainingError later.
    """
    index = load_index(images.url("index.json"))
    columns = ("image_embedding", *config.conditioning.conditions)
    frozen, stored = frozen_networks(columns, images, index, resolution=config.data.resolution, contrastive=contrastive)
    dataset_info = DatasetInfo(num_classes=len(index.classes), **frozen.sizes)
    settings = {"role": "diffusion_prior", "objective": config.process.objective()}
    network = network_arguments(config, dataset_info)
    model = ModelDescription("diffusion_prior", network, settings, texts={BPE: read_bpe(index)})
    return train_on_images(
        DiffusionPriorTask,
        config,
        context,
        index,
        model=model,
        arrays=stored,
        dataset_info=dataset_info,
        load_encoders=frozen.load_encoders,
    )
