"""An image in, an image out: one model for several degradations, and held-out images restored by it."""

from components.stages.cascade import compose_cascade
from components.stages.diffusion import train_diffusion
from components.stages.images import images_identity, ingest_images
from components.stages.restoration import measure_restoration
from pipelines.recipes.image_to_image import ImageToImageRecipe
from pipelines.workflow import Stage, Workflow


def image_to_image(recipe: ImageToImageRecipe) -> Workflow:
    """Palette, GLIDE's inpainting, super-resolution: what the model can do, the recipe's tasks say."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    model = Stage("image_to_image", train_diffusion, recipe.model, images=images)
    cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
    restoration = Stage("restoration", measure_restoration, recipe.restoration, images=images, cascade=cascade)
    return Workflow(recipe.name, [images, model, cascade, restoration])
