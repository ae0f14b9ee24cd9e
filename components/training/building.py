"""A training's networks, built from its configuration and from what the data set decides."""

from typing import Any

from torch import nn

from components.configuration.dataset_info import IMAGES, DatasetInfo, TokenGrid
from components.configuration.optimization import Training
from components.models.bundle import NETWORKS
from components.models.discriminator import PatchDiscriminator
from components.models.gan import ProjectionDiscriminator

DISCRIMINATORS: dict[str, type[nn.Module]] = {  # by the kind of the network that is trained against it
    "autoencoder": PatchDiscriminator,
    "gan": ProjectionDiscriminator,
}


def make_network(training: Training, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> Any:
    """The network that is stored in the end, with initial weights; arguments and errors are those of
    `Training.network_arguments`."""
    return NETWORKS[training.network.kind](**training.network_arguments(dataset_info, grid))


def make_discriminator(training: Training, dataset_info: DatasetInfo = IMAGES) -> Any:
    """The network that is trained against it, with initial weights; None where there is none."""
    arguments = training.discriminator_arguments(dataset_info)
    return None if arguments is None else DISCRIMINATORS[training.network.kind](**arguments)
