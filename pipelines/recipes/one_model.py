"""The shape of a recipe of one model that is trained on the images themselves."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.sampling import OneModelSampling
from components.configuration.trainings import AnyLoneModel, AutoencoderTraining, PixelTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig


class OneModelRecipe(Config):
    """An autoencoder, a PixelCNN, a PixelRNN or a GAN."""

    workflow: Literal["one_model"] = "one_model"
    name: str
    images: ImagesConfig
    model: AnyLoneModel
    sampling: OneModelSampling = OneModelSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @property
    def makes_images(self) -> bool:
        """An autoencoder with codes needs a prior over them first: that is a token branch."""
        return not isinstance(self.model, AutoencoderTraining) or self.model.network.bottleneck == "gaussian"

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        side = self.model.data.resolution
        if side is None:
            raise ValueError("model.resolution is missing: a model of images needs it")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least model.resolution {side}")
        if self.sampling.model is not None and not isinstance(self.model, PixelTraining):
            raise ValueError(f"sampling.model must be empty: a {self.model.network.kind} leaves nothing to choose")
        return self
