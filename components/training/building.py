"""A training's network, built from its configuration and from what the data set decides."""

from typing import Any

from components.configuration.conditions import PaddedTextConfig, TextConfig
from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.diffusion import DiffusionTraining
from components.configuration.networks import UNetSizes
from components.configuration.trainings import (
    AnyTraining,
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.models.bundle import NETWORKS

IMAGES = DatasetInfo(num_classes=1)  # a set of which nothing but the images matters


def make_network(training: AnyTraining, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> Any:
    """The module of its kind, with initial weights. Raises ValueError for a data set that it can't learn from."""
    return NETWORKS[training.network.kind](**network_arguments(training, dataset_info, grid))


def network_arguments(
    training: AnyTraining, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None
) -> dict[str, Any]:
    """Arguments of its constructor; plain values, they go into the bundle.

    Args:
        grid: of the tokens that a prior learns; None for what learns images.
    """
    own = training.network.model_dump(mode="json", exclude={"kind"})
    match training:
        case DiffusionTraining():
            return own | diffusion_arguments(training, dataset_info)
        case PriorTraining() | MaskedPriorTraining():
            assert grid is not None
            return own | token_arguments(training, dataset_info, grid)
        case PixelTraining():
            return own | pixel_arguments(training, dataset_info, grid)
        case AutoencoderTraining():
            return own | {"resolution": training.data.resolution}
        case GANTraining():
            return own | {"resolution": training.data.resolution, "num_classes": classes_of(training, dataset_info)}
        case ClassifierTraining():
            return own | {"resolution": training.data.resolution, "num_classes": dataset_info.num_classes}
        case ContrastiveTraining():
            if dataset_info.vocab_size == 0:
                raise ValueError("a contrastive encoder needs images with captions, and this set has none")
            return own | {"resolution": training.data.resolution, "text": text_arguments(training.text, dataset_info)}
        case DiffusionPriorTraining():
            return own | {
                "embedding_dim": dataset_info.image_embedding_dim,
                "text_length": dataset_info.text_states_length,
                "text_dim": dataset_info.text_states_dim,
            }


def discriminator_arguments(training: GANTraining, dataset_info: DatasetInfo) -> dict[str, Any]:
    """Arguments of a GAN's other network, which no bundle keeps."""
    return {
        "resolution": training.data.resolution,
        "channels": training.adversary.discriminator_channels,
        "channel_mult": training.adversary.discriminator_channel_mult,
        "num_classes": classes_of(training, dataset_info),
        "attention_resolutions": training.network.attention_resolutions,
    }


def diffusion_arguments(training: DiffusionTraining, dataset_info: DatasetInfo) -> dict[str, Any]:
    """What conditions, process and data make of a U-Net or DiT. A label that is never dropped needs no null label, and
    noise that is never added no embedding of its level."""
    conditioning, data, low_res = training.conditioning, training.data, training.low_res
    text = text_arguments(conditioning.text, dataset_info) if "text" in conditioning.conditions else None
    sizes = {"text_states": dataset_info.text_states_dim, "image_embedding": dataset_info.image_embedding_dim}
    made = {name: size for name, size in sizes.items() if name in conditioning.conditions}  # by frozen encoders
    windows = {"middle_attention": data.crop_size is None} if isinstance(training.network, UNetSizes) else {}
    return windows | {
        "resolution": data.resolution,
        "in_channels": data.in_channels,
        "out_channels": data.in_channels,
        "learned_variance": getattr(training.process, "variance", None) == "learned_range",
        "num_classes": classes_of(training, dataset_info),
        "null_label": conditioning.cond_drop_prob > 0,
        "text": text,
        "text_states_dim": conditioning.text_states_dim or made.get("text_states"),
        "image_embedding_dim": conditioning.image_embedding_dim or made.get("image_embedding"),
        "condition_image_channels": training.image_channels,
        "low_res": low_res is not None,
        "embed_noise_level": low_res is None or low_res.max_noise_level > 0,
    }


def token_arguments(
    training: PriorTraining | MaskedPriorTraining, dataset_info: DatasetInfo, grid: TokenGrid
) -> dict[str, Any]:
    """What the grid and the conditions make of a transformer over tokens."""
    conditions = training.conditioning.conditions
    text, condition = "text" in conditions, dataset_info.condition if "condition" in conditions else None
    learns_text = {"predict_text": training.text_loss_weight > 0} if isinstance(training, PriorTraining) else {}
    return learns_text | {
        "codebook_size": grid.codebook_size,
        "num_tokens": grid.height * grid.width,
        "grid": [grid.height, grid.width],
        "num_classes": classes_of(training, dataset_info),
        "vocab_size": dataset_info.vocab_size if text else None,
        "text_length": dataset_info.text_length if text else None,
        "condition_codebook_size": condition.codebook_size if condition else None,
        "condition_grid": [condition.height, condition.width] if condition else None,
    }


def pixel_arguments(training: PixelTraining, dataset_info: DatasetInfo, grid: TokenGrid | None) -> dict[str, Any]:
    """What the values make of a PixelCNN or Row LSTM: those of raw pixels where there is no grid."""
    return {
        "num_values": 256 if grid is None else grid.codebook_size,
        "num_channels": training.data.in_channels if grid is None else 1,
        "num_classes": classes_of(training, dataset_info),
        "embedding": "intensity" if grid is None else "table",
    }


def classes_of(
    training: DiffusionTraining | PriorTraining | MaskedPriorTraining | PixelTraining | GANTraining,
    dataset_info: DatasetInfo,
) -> int | None:
    """How many classes the network knows; None if it is not conditioned on them."""
    return dataset_info.num_classes if "label" in training.conditioning.conditions else None


def text_arguments(text: TextConfig, dataset_info: DatasetInfo) -> dict[str, Any]:
    """Arguments of a text transformer."""
    padding = {"learned_padding": text.text_padding == "learned"} if isinstance(text, PaddedTextConfig) else {}
    return padding | {
        "vocab_size": dataset_info.vocab_size,
        "context_length": dataset_info.text_length,
        "model_dim": text.text_dim,
        "num_layers": text.text_layers,
        "num_heads": text.text_heads,
    }
