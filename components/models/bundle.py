"""A trained model on disk: safetensors weights and a JSON description, independent of the recipe.
Imports only what the packed model of the registry carries (no ray, mlflow, fsspec or pydantic)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from components.models.autoencoder import Autoencoder
from components.models.contrastive import ContrastiveEncoder, DiffusionPrior
from components.models.dit import DiT
from components.models.gan import GANGenerator
from components.models.pixelcnn import GatedPixelCNN, RowLSTM
from components.models.transformer import MaskedTransformer, Transformer
from components.models.unet import NoisyClassifier, UNet

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
NETWORKS: dict[str, type[nn.Module]] = {
    "autoencoder": Autoencoder,
    "transformer": Transformer,
    "masked_transformer": MaskedTransformer,
    "pixelcnn": GatedPixelCNN,
    "row_lstm": RowLSTM,
    "gan": GANGenerator,
    "unet": UNet,
    "image_attention_unet": UNet,
    "dit": DiT,
    "classifier": NoisyClassifier,
    "contrastive": ContrastiveEncoder,
    "diffusion_prior": DiffusionPrior,
}


class ModelBundle(NamedTuple):
    """A trained model: a kind of network, constructor arguments, settings of sampling, and the network."""

    kind: str  # a key of NETWORKS
    network: dict[str, Any]  # arguments of the network's constructor
    settings: dict[str, Any]  # what sampling needs to know: resolution, schedule, classes, …
    module: nn.Module


def save_bundle(folder: Path, bundle: ModelBundle) -> None:
    """Write weights (fp32) and description into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.module.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    write_description(folder, kind=bundle.kind, network=bundle.network, settings=bundle.settings)


def write_description(folder: Path, **description: Any) -> None:
    """Write what `load_bundle` needs besides weights: `kind`, `network` and `settings` of a ModelBundle."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def describe_bundle(description: bytes) -> ModelBundle:
    """The model of a DESCRIPTION file, on the meta device: shapes without weights or memory."""
    parsed = json.loads(description)
    with torch.device("meta"):
        module = built(parsed)
    return ModelBundle(parsed["kind"], parsed["network"], parsed["settings"], module)


def load_bundle(folder: Path) -> ModelBundle:
    """Rebuild the network and load the weights, in evaluation mode on the CPU in fp32.
    Raises ValueError if the folder holds no model, or one that this version doesn't know."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION}; give the folder of a trained model")
    try:
        description = json.loads(path.read_text())
        module = built(description)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        module.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} is missing or damaged ({error}): copy the model again") from None
    except RuntimeError as error:  # torch lists what is missing, too much or of another shape, a line each
        first = str(error).splitlines()[1].strip().rstrip(" .")
        raise ValueError(f"{folder / WEIGHTS}: weights of another version perhaps: {first}; train it again") from None
    return ModelBundle(description["kind"], description["network"], description["settings"], module.eval().float())


def built(description: Mapping[str, Any]) -> nn.Module:
    """The network of a description, with initial weights. Raises ValueError for another version."""
    kind, network = description["kind"], description["network"]
    if kind not in NETWORKS:
        raise ValueError(f"unknown kind {kind!r}, of another version perhaps; known are {', '.join(NETWORKS)}")
    try:
        return NETWORKS[kind](**network)
    except TypeError as error:  # it takes other arguments here
        raise ValueError(f"a network {kind} of another version perhaps: {error}; train it again") from None
