"""The shape of a recipe of one model that works on images."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import RestorationSampling
from components.stages.images import ImagesConfig
from components.stages.restoration import RestorationConfig
from pipelines.recipes.checks import check_steps


class ImageToImageRecipe(Config):
    """One model, and how well it restores held-out images."""

    workflow: Literal["image_to_image"] = "image_to_image"
    name: str
    images: ImagesConfig
    model: DiffusionTraining
    sampling: RestorationSampling = RestorationSampling()
    restoration: RestorationConfig

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        if self.images.resolution < self.model.data.resolution:
            raise ValueError(f"images.resolution must be at least model.resolution {self.model.data.resolution}")
        if self.model.degradation is None:
            raise ValueError("model.degradation is missing: what it restores")
        check_steps("sampling.model", self.sampling.model, self.model)
        if self.images.holdout_fraction == 0:
            raise ValueError("images.holdout_fraction must be above 0: held-out images are restored")
        return self
