"""The shape of a recipe of one model that is trained on the images themselves."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.configuration import Config
from components.stages.cascade import CascadeConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.training.config import AutoencoderConfig, GANConfig, PixelConfig


class OneModelRecipe(Config):
    """An autoencoder, a PixelCNN, a PixelRNN or a GAN."""

    workflow: Literal["one_model"] = "one_model"
    name: str
    images: ImagesConfig
    model: Annotated[AutoencoderConfig | PixelConfig | GANConfig, Field(discriminator="network")]
    cascade: CascadeConfig = CascadeConfig()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @property
    def makes_images(self) -> bool:
        """An autoencoder with codes needs a prior over them first: that is a token branch."""
        return not isinstance(self.model, AutoencoderConfig) or self.model.bottleneck == "gaussian"

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        if self.model.resolution is None:
            raise ValueError("model.resolution is missing: a model of images needs it")
        if self.images.resolution < self.model.resolution:
            raise ValueError(f"images.resolution must be at least model.resolution {self.model.resolution}")
        return self
