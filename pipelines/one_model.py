"""One model trained on the images themselves: an autoencoder, a PixelCNN, a PixelRNN or a GAN."""

from collections.abc import Callable
from typing import Any

from components.configuration.trainings import AutoencoderTraining
from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.evaluate import evaluate
from components.stages.gan import train_gan
from components.stages.images import images_identity, ingest_images
from components.stages.pixels import train_pixels
from components.stages.samples import sample_generators
from components.storage.artifact import Artifact
from pipelines.recipes.one_model import OneModelRecipe
from pipelines.workflow import Stage, Workflow

TRAININGS: dict[str, Callable[..., Artifact]] = {
    "autoencoder": train_autoencoder,
    "pixelcnn": train_pixels,
    "row_lstm": train_pixels,
    "gan": train_gan,
}


def one_model(recipe: OneModelRecipe) -> Workflow:
    """An autoencoder is shown by what it keeps of held-out images, all that can make images by what they make."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    model = Stage(stage_name(recipe), TRAININGS[recipe.model.network.kind], recipe.model, images=images)
    stages, shown = [images, model], dict[str, Any]()
    if isinstance(recipe.model, AutoencoderTraining):
        shown["tokenizer"] = model
    if recipe.makes_images:
        cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
        shown["samples"] = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
        stages += [cascade, shown["samples"]]
    return Workflow(recipe.name, [*stages, Stage("evaluation", evaluate, recipe.evaluation, images=images, **shown)])


def stage_name(recipe: OneModelRecipe) -> str:
    """The same in every workflow, so that a generator with the same numbers finds the model trained."""
    return (
        autoencoder_name(recipe.model) if isinstance(recipe.model, AutoencoderTraining) else recipe.model.network.kind
    )


def autoencoder_name(config: AutoencoderTraining) -> str:
    return "vae" if config.network.bottleneck == "gaussian" else "tokenizer"
