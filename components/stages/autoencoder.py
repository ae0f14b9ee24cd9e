"""Train an autoencoder: the tokenizer of the token branch, or a VAE."""

from components.configuration.trainings import AutoencoderTraining
from components.data.shards import check_member, load_index
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.stages.training import train_on_images
from components.training.building import network_arguments
from components.training.perceptual_weights import check_perceptual_network
from components.training.results import ModelDescription
from components.training.tasks.autoencoder import AutoencoderTask


def train_autoencoder(config: AutoencoderTraining, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the images of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises PerceptualWeightsError, and ShardError for a set without the member that the recipe names, before anything is
    started; TrainingError later.
    """
    if config.losses.perceptual_weight > 0:
        check_perceptual_network(config.losses.perceptual_network, weights_uri=config.losses.perceptual_weights_uri)
    index = load_index(images.url("index.json"))
    check_member(index, config.data.member)
    settings = {"resolution": config.data.resolution, "member": config.data.member}
    model = ModelDescription("autoencoder", network_arguments(config), settings, learner="generator.")
    return train_on_images(AutoencoderTask, config, context, index, model=model, member=config.data.member)
