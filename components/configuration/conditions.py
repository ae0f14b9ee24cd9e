"""Facts of a data set known before its first sample; conditions of a model, and their dropping."""

from typing import Any, Literal

from pydantic import Field

from components.configuration.config import Config


class TokenGrid(Config):
    """Codebook size and shape of an image's grid of tokens."""

    codebook_size: int = Field(ge=2)
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class DatasetInfo(Config):
    """Conditions of a data set with their sizes, read from the set's index."""

    num_classes: int = Field(ge=1)
    vocab_size: int = Field(0, ge=0)  # of the BPE; 0: no captions
    text_length: int = Field(0, ge=0)
    condition: TokenGrid | None = None  # of the condition images, where there are any
    image_embedding_dim: int = Field(0, ge=0)  # sizes of frozen encoders' arrays; this and the next two
    text_states_dim: int = Field(0, ge=0)
    text_states_length: int = Field(0, ge=0)


IMAGES = DatasetInfo(num_classes=1)  # a set of which nothing but the images matters


Condition = Literal["label", "text", "text_states", "condition_image", "image_embedding"]
TokenCondition = Literal["label", "text", "condition"]  # condition: tokens of another image
Member = Literal["image", "depth", "mask"]  # members of a sample that are images


class ConditionsConfig(Config):
    """Conditions by name, and the dropping of conditions in training."""

    conditions: tuple[str, ...] = ("label",)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"  # all of a sample's together, or each by itself

    def num_classes(self, dataset_info: DatasetInfo) -> int | None:
        """Number of classes that the network knows; None without class conditioning."""
        return dataset_info.num_classes if "label" in self.conditions else None


class TextConfig(Config):
    """Sizes of a text transformer, trained together with the model."""

    text_dim: int = Field(64, ge=8)
    text_layers: int = Field(2, ge=1)
    text_heads: int = Field(4, ge=1)

    def arguments(self, dataset_info: DatasetInfo) -> dict[str, Any]:
        """Arguments of `components.models.layers.TextTransformer` for the captions of a set."""
        return {
            "vocab_size": dataset_info.vocab_size,
            "context_length": dataset_info.text_length,
            "model_dim": self.text_dim,
            "num_layers": self.text_layers,
            "num_heads": self.text_heads,
        }


class PaddedTextConfig(TextConfig):
    """Sizes of the text transformer of a diffusion model, and the embedding of padding."""

    text_padding: Literal["hidden", "learned"] = "hidden"  # learned: GLIDE's, attended to

    def arguments(self, dataset_info: DatasetInfo) -> dict[str, Any]:
        return {"learned_padding": self.text_padding == "learned"} | super().arguments(dataset_info)


class DiffusionConditions(ConditionsConfig):
    """Conditions of a diffusion model: classes, text, embeddings and condition images."""

    conditions: tuple[Condition, ...] = ("label",)
    text: PaddedTextConfig = PaddedTextConfig()  # used where text is a condition
    text_states_dim: int | None = Field(None, ge=1)  # features of a state of a frozen text encoder; None: as it makes
    image_embedding_dim: int | None = Field(None, ge=1)  # the same of an image encoder
    condition_member: Member | None = None  # member of each sample to use as condition_image


class TokenConditions(ConditionsConfig):
    """Conditions of a prior over tokens: classes, text, and tokens of another image."""

    conditions: tuple[TokenCondition, ...] = ("label",)


class LabelConditions(ConditionsConfig):
    """Conditions of a model that knows classes at most."""

    conditions: tuple[Literal["label"], ...] = ("label",)


class PriorConditions(ConditionsConfig):
    """Conditions of DALL-E 2's diffusion prior."""

    conditions: tuple[Literal["text_states", "text_embedding"], ...] = ("text_states", "text_embedding")
    cond_drop: Literal["joint"] = "joint"
