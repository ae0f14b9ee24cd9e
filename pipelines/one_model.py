"""One model trained on the images themselves: an autoencoder, a PixelCNN, a PixelRNN or a GAN."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.sampling import OneModelSampling
from components.configuration.trainings import AnyLoneModel, AutoencoderTraining, GANTraining
from components.runtime.storage.artifact import Artifact
from components.sampling.model import SAMPLING
from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.gan import train_gan
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.likelihood import LikelihoodConfig, measure_likelihood
from components.stages.pixels import train_pixels
from components.stages.samples import SamplesConfig, sample_generators
from pipelines.workflow import Stage, Workflow


class OneModelRecipe(Config):
    """An autoencoder, a PixelCNN, a PixelRNN or a GAN."""

    workflow: Literal["one_model"] = "one_model"
    name: str
    images: ImagesConfig
    model: AnyLoneModel
    sampling: OneModelSampling = OneModelSampling()
    samples: SamplesConfig | None = None  # None: an autoencoder of which nothing is drawn
    likelihood: LikelihoodConfig | None = None  # exact of a PixelCNN or PixelRNN, a bound of a VAE
    evaluation: EvaluationConfig

    @property
    def drawn(self) -> SamplesConfig | None:
        """The samples; none of an autoencoder with codes, which needs a prior over them first: a token branch."""
        has_codes = isinstance(self.model, AutoencoderTraining) and self.model.network.bottleneck.kind != "gaussian"
        return None if has_codes else self.samples

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        side = self.model.data.resolution
        if side is None:
            raise ValueError("model.resolution is missing: a model of images needs it")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least model.resolution {side}")
        return self

    @model_validator(mode="after")
    def _a_generator_is_sampled(self) -> Self:
        if self.samples is None and not isinstance(self.model, AutoencoderTraining):
            raise ValueError(f"samples is missing: a {self.model.network.kind} is known by the images that it makes")
        return self

    @model_validator(mode="after")
    def _the_model_has_a_likelihood(self) -> Self:
        model = self.model
        if self.likelihood is None:
            return self
        if isinstance(model, GANTraining):
            raise ValueError("likelihood must be empty: a gan has none")
        if self.likelihood.timesteps_per_image is not None:
            raise ValueError("likelihood.timesteps_per_image must be empty: only diffusion has timesteps")
        if isinstance(model, AutoencoderTraining):
            network = model.network
            if network.bottleneck.kind != "gaussian" or network.reconstruction != "discretized_logistic":
                raise ValueError(
                    "likelihood needs model.bottleneck gaussian and model.reconstruction discretized_logistic"
                )
        return self

    @model_validator(mode="after")
    def _sampling_is_its_own(self) -> Self:
        chosen, kind = self.sampling.model, self.model.network.kind
        wanted = SAMPLING.get(kind)
        if chosen is None or type(chosen) is wanted:
            return self
        if wanted is None:
            raise ValueError(f"sampling.model must be empty: a {kind} leaves nothing to choose")
        raise ValueError(f"sampling.model: a {kind} takes {', '.join(wanted.model_fields)}")


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
    if recipe.drawn is not None:
        cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
        shown["samples"] = Stage("samples", sample_generators, recipe.drawn, images=images, cascade=cascade)
        stages += [cascade, shown["samples"]]
    if recipe.likelihood is not None:
        stages.append(Stage("likelihood", measure_likelihood, recipe.likelihood, images=images, model=model))
    return Workflow(recipe.name, [*stages, Stage("evaluation", evaluate, recipe.evaluation, images=images, **shown)])


def stage_name(recipe: OneModelRecipe) -> str:
    """The same in every workflow, so that a generator with the same numbers finds the model trained."""
    return (
        autoencoder_name(recipe.model) if isinstance(recipe.model, AutoencoderTraining) else recipe.model.network.kind
    )


def autoencoder_name(config: AutoencoderTraining) -> str:
    return "vae" if config.network.bottleneck.kind == "gaussian" else "tokenizer"
