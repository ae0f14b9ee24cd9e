"""A training's networks, built from the configuration and the data set's facts."""

from typing import Any

from torch import nn

from components.configuration.conditions import IMAGES, DatasetInfo, TokenGrid
from components.configuration.optimization import Training
from components.models.bundle import NETWORKS
from components.models.critics import PatchDiscriminator
from components.models.gan import ProjectionDiscriminator

DISCRIMINATORS: dict[str, type[nn.Module]] = {  # by the kind of the network trained against it
    "autoencoder": PatchDiscriminator,
    "gan": ProjectionDiscriminator,
}


def make_network(training: Training, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> Any:
    """The network to be stored after training, with initial weights.

    Arguments and errors are those of `Training.network_arguments`.
    """
    return NETWORKS[training.network.kind](**training.network_arguments(dataset_info, grid))


def make_discriminator(training: Training, dataset_info: DatasetInfo = IMAGES) -> Any:
    """The discriminator of a training, with initial weights; None for a training without any."""
    arguments = training.discriminator_arguments(dataset_info)
    return None if arguments is None else DISCRIMINATORS[training.network.kind](**arguments)
