"""An image in, an image out: one model for several degradations, and held-out images restored by it."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import RestorationSampling
from components.stages.cascade import compose_cascade
from components.stages.diffusion import train_diffusion
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.restoration import RestorationConfig, measure_restoration
from pipelines.recipes.checks import check_steps
from pipelines.workflow import Stage, Workflow


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


def image_to_image(recipe: ImageToImageRecipe) -> Workflow:
    """Palette, GLIDE's inpainting, super-resolution: what the model can do, the recipe's tasks say."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    model = Stage("image_to_image", train_diffusion, recipe.model, images=images)
    cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
    restoration = Stage("restoration", measure_restoration, recipe.restoration, images=images, cascade=cascade)
    return Workflow(recipe.name, [images, model, cascade, restoration])
