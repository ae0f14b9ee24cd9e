"""Trainings of models over single values: transformers over tokens, PixelCNN and Row LSTM."""

from typing import Annotated, Any, Literal

from pydantic import Field

from components.configuration import networks
from components.configuration.conditions import IMAGES, DatasetInfo, LabelConditions, TokenConditions, TokenGrid
from components.configuration.config import Config, refuse
from components.configuration.optimization import Training, TrainingNeeds


class TokenTraining(Training):
    """Network, conditions, and needs shared by both transformers over tokens."""

    network: networks.TokenNetworkConfig
    conditioning: TokenConditions = TokenConditions()

    def needs(self) -> TrainingNeeds:
        conditions = self.conditioning.conditions
        return TrainingNeeds(columns=conditions, captions="text" in conditions)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        assert grid is not None
        conditions = self.conditioning.conditions
        text, condition = "text" in conditions, dataset_info.condition if "condition" in conditions else None
        return super().network_arguments(dataset_info, grid) | {
            "codebook_size": grid.codebook_size,
            "num_tokens": grid.height * grid.width,
            "grid": [grid.height, grid.width],
            "num_classes": self.conditioning.num_classes(dataset_info),
            "vocab_size": dataset_info.vocab_size if text else None,
            "text_length": dataset_info.text_length if text else None,
            "condition_codebook_size": condition.codebook_size if condition else None,
            "condition_grid": [condition.height, condition.width] if condition else None,
        }

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return prior_settings(classes, grid)


class PriorTraining(TokenTraining):
    """A causal transformer over tokens (Esser et al., 2021)."""

    stage_version = 2  # dropout on residual branches alone

    network: networks.TransformerConfig
    token_corruption: float = Field(0.0, ge=0, lt=1)  # share of inputs replaced by random ones
    text_loss_weight: float = Field(0.0, ge=0, lt=1)  # w text + (1 - w) image, DALL-E 1/8; 0: a condition only

    def _check(self) -> None:
        wordless = self.text_loss_weight > 0 and "text" not in self.conditioning.conditions
        refuse(wordless, f"text_loss_weight {self.text_loss_weight} needs text among the conditions")
        conditions, bare = self.conditioning.conditions, not self.network.class_token
        refuse(bare and "label" in conditions, "class_token false knows no label: leave it out of the conditions")
        refuse(bare and not conditions, "class_token false needs text or condition among the conditions")

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        return super().network_arguments(dataset_info, grid) | {"predict_text": self.text_loss_weight > 0}


class MaskedPriorTraining(TokenTraining):
    """A transformer over tokens, some masked (MaskGIT; Chang et al., 2022)."""

    stage_version = 2  # dropout on residual branches alone

    network: networks.MaskedTransformerConfig
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class PixelData(Config):
    """Resolution and channels of the data of a PixelCNN or Row LSTM."""

    resolution: int | None = Field(None, ge=2)  # pixels; None: the grid of the tokens
    in_channels: Literal[1, 3] = 3  # of pixels; 1: gray images


class PixelTraining(Training):
    """Gated PixelCNN or Row LSTM over 8-bit RGB or gray, or over tokens where `resolution` is None."""

    can_adapt = False  # its samplers read weights outside of a forward pass

    network: Annotated[networks.PixelCNNConfig | networks.RowLSTMConfig, Field(discriminator="kind")]
    conditioning: LabelConditions = LabelConditions()
    data: PixelData = PixelData()

    def _check(self) -> None:
        network, colors = self.network, 1 if self.data.resolution is None else self.data.in_channels
        shares = colors * (2 if network.kind == "row_lstm" else 1)
        channels, kind = network.channels, network.kind
        refuse(channels % shares, f"channels {channels} must be a multiple of {shares} for a {kind}")

    def check_likelihood(self) -> None:
        """Every model of pixels states an exact likelihood."""

    def needs(self) -> TrainingNeeds:
        return TrainingNeeds(self.data.resolution)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        """Arguments of a PixelCNN or Row LSTM over raw pixels, or over tokens where `grid` is given."""
        return super().network_arguments(dataset_info, grid) | {
            "num_values": 256 if grid is None else grid.codebook_size,
            "num_channels": self.data.in_channels if grid is None else 1,
            "num_classes": self.conditioning.num_classes(dataset_info),
            "embedding": "intensity" if grid is None else "table",
        }

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        if grid is None:
            return {"classes": list(classes), "resolution": self.data.resolution}
        return prior_settings(classes, grid)


def prior_settings(classes: tuple[str, ...], grid: TokenGrid | None) -> dict[str, Any]:
    """Facts of a prior over tokens for the sampler: classes and grid."""
    assert grid is not None
    return {"role": "prior", "grid": [grid.height, grid.width], "classes": list(classes)}
