"""Autoencoders of artifacts: opened by workers, described to the head, which holds no weights."""

from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION, ModelBundle, describe_bundle, load_bundle
from components.runtime.storage.artifact import Artifact


def open_autoencoder(artifact: Artifact) -> Autoencoder:
    """The trained network. Raises ValueError for a model of another kind."""
    with artifact.local_copy() as folder:
        return _autoencoder_of(load_bundle(folder)).requires_grad_(False)


def describe_autoencoder(artifact: Artifact) -> Autoencoder:
    """The network without weights, on the meta device. Raises ValueError for a model of another kind."""
    return _autoencoder_of(describe_bundle(artifact.read(DESCRIPTION)))


def _autoencoder_of(bundle: ModelBundle) -> Autoencoder:
    if not isinstance(bundle.module, Autoencoder):
        raise ValueError(f"an autoencoder is needed, not a model of kind {bundle.kind}")
    return bundle.module
