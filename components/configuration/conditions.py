"""What a model is conditioned on, and what of it is left out in training for classifier-free guidance."""

from typing import Literal

from pydantic import Field

from components.configuration.config import Config

Condition = Literal["label", "text", "text_states", "condition_image", "image_embedding"]
TokenCondition = Literal["label", "text", "condition"]  # condition: tokens of another image, by their own tokenizer
Member = Literal["image", "depth", "mask"]  # what of a sample is an image


class ConditionsConfig(Config):
    """Conditions by name, and how they are left out."""

    conditions: tuple[str, ...] = ("label",)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"  # all of a sample's together, or each by itself


class TextConfig(Config):
    """A text transformer that is trained with its model."""

    text_dim: int = Field(64, ge=8)
    text_layers: int = Field(2, ge=1)
    text_heads: int = Field(4, ge=1)


class PaddedTextConfig(TextConfig):
    """That of a diffusion model."""

    text_padding: Literal["hidden", "learned"] = "hidden"  # learned: GLIDE's, attended to


class DiffusionConditions(ConditionsConfig):
    """Of a diffusion model."""

    conditions: tuple[Condition, ...] = ("label",)
    text: PaddedTextConfig = PaddedTextConfig()  # where text is a condition
    text_states_dim: int | None = Field(None, ge=1)  # features of a state of a frozen text encoder; None: as it makes
    image_embedding_dim: int | None = Field(None, ge=1)  # the same of an image encoder
    condition_member: Member | None = None  # what of each sample is its condition_image


class TokenConditions(ConditionsConfig):
    """Of a prior over tokens."""

    conditions: tuple[TokenCondition, ...] = ("label",)


class LabelConditions(ConditionsConfig):
    """Of a model that knows classes at most."""

    conditions: tuple[Literal["label"], ...] = ("label",)


class PriorConditions(ConditionsConfig):
    """Of DALL-E 2's diffusion prior."""

    conditions: tuple[Literal["text_states", "text_embedding"], ...] = ("text_states", "text_embedding")
    cond_drop: Literal["joint"] = "joint"
