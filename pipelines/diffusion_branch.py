"""The continuous branch alone: a base, its upsamplers, and the networks that they are trained against."""

from typing import Any, Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import DiffusionBranchSampling
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    check_guide,
)
from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.classifier import train_classifier
from components.stages.contrastive import train_contrastive
from components.stages.diffusion import train_diffusion
from components.stages.diffusion_prior import train_diffusion_prior
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.precompute import PrecomputeConfig, precompute
from components.stages.samples import SamplesConfig, sample_generators
from components.stages.text_encoder import TextEncoderConfig, import_text_encoder
from pipelines.one_model import autoencoder_name
from pipelines.recipes.checks import check_cascade, check_channels, check_weaker
from pipelines.workflow import Stage, Workflow


class DiffusionBranchRecipe(Config):
    """A base and any number of upsamplers; and, where there are some, the networks that are trained before them.

    With `autoencoder` the base makes latents (Stable Diffusion), with `text_encoder` or `contrastive` it is asked by
    a frozen encoder's states of a text (Imagen), with `diffusion_prior` by an embedding of the image that a text asks
    for (DALL-E 2).
    """

    workflow: Literal["diffusion_branch"] = "diffusion_branch"
    name: str
    images: ImagesConfig
    autoencoder: AutoencoderTraining | None = None
    contrastive: ContrastiveTraining | None = None
    text_encoder: TextEncoderConfig | None = None
    diffusion_prior: DiffusionPriorTraining | None = None
    precompute: PrecomputeConfig | None = None  # what the frozen networks make, once, for base and diffusion_prior
    classifier: ClassifierTraining | None = None  # of noisy images; guides the base
    weaker: DiffusionTraining | None = None  # smaller, or trained for fewer steps; guides the base
    base: DiffusionTraining
    upsamplers: tuple[DiffusionTraining, ...] = ()
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        made = (self.autoencoder or self.base).data.resolution
        made = check_cascade(self.base, self.upsamplers, self.sampling, made=made)
        if self.images.resolution < made:
            raise ValueError(f"images.resolution {self.images.resolution} is below {made}, which a model makes")
        if self.classifier is not None and self.autoencoder is None:
            check_guide(self.classifier, self.base)
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        elif self.sampling.base.autoguidance_scale != 1:
            raise ValueError("sampling.base.autoguidance_scale must be 1: there is no weaker model to be guided by")
        return self

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        if self.autoencoder is None:
            check_channels(self.base, self.upsamplers)
            return self
        side = self.autoencoder.data.resolution // self.autoencoder.network.factor
        if self.base.data.resolution != side:
            raise ValueError(f"base.data.resolution must be {side}, the side of the autoencoder's latents")
        if self.base.data.in_channels != (channels := self.autoencoder.network.diffused_channels):
            raise ValueError(f"base.data.in_channels must be {channels}, those of the autoencoder's latents")
        if self.sampling.base.threshold != "none":
            raise ValueError("sampling.base.threshold must be none: latents have no range to be clipped to")
        if self.classifier is not None:
            raise ValueError("classifier knows images, the base makes latents: leave one of them out")
        return self

    @model_validator(mode="after")
    def _encoders_are_there(self) -> Self:
        models = (self.base, *self.upsamplers)
        asked = {name for model in models for name in model.conditioning.conditions}
        if "text_states" in asked and self.contrastive is None and self.text_encoder is None:
            raise ValueError("text_states among the conditions need contrastive or text_encoder")
        if "image_embedding" in asked and (self.contrastive is None or self.diffusion_prior is None):
            raise ValueError("image_embedding among the conditions needs contrastive and diffusion_prior")
        if self.diffusion_prior is not None and "image_embedding" not in asked:
            raise ValueError("diffusion_prior makes image_embedding, which is among no model's conditions")
        if self.diffusion_prior is not None and self.text_encoder is not None:
            raise ValueError("contrastive reads the prompts of a diffusion_prior: leave text_encoder out")
        return self

    @model_validator(mode="after")
    def _encoders_fit(self) -> Self:
        encoder, prior = self.contrastive, self.diffusion_prior
        if encoder is None:
            return self
        made = {"image_embedding": encoder.network.embedding_dim}
        made |= {} if self.text_encoder else {"text_states": encoder.text.text_dim}
        models = {"base": self.base} | {f"upsamplers.{n}": upsampler for n, upsampler in enumerate(self.upsamplers)}
        for where, model in models.items():
            for condition in made.keys() & {*model.conditioning.conditions}:
                if getattr(model.conditioning, f"{condition}_dim") not in (None, made[condition]):
                    raise ValueError(f"{where}.{condition}_dim must be {made[condition]}, as contrastive makes it")
        seen = encoder.data.resolution
        if prior is not None and prior.data.resolution < seen:
            raise ValueError(f"diffusion_prior.resolution must be at least contrastive.resolution {seen}")
        learned = (self.autoencoder or self.base).data.resolution
        if "image_embedding" in self.base.conditioning.conditions and learned < seen:
            raise ValueError(f"contrastive.resolution must be at most {learned}, that of the images base learns from")
        return self

    @model_validator(mode="after")
    def _precompute_fits(self) -> Self:
        wanted, autoencoder = self.precompute, self.autoencoder
        if wanted is None:
            return self
        text = self.contrastive or self.text_encoder
        makers = {"latents": autoencoder, "image_embedding": self.contrastive, "text_states": text}
        for column in wanted.columns:
            if makers.get(column, self.contrastive) is None:
                raise ValueError(f"{column} among precompute.columns has no model that makes it in this recipe")
        if self.images.resolution < wanted.resolution:
            raise ValueError(f"images.resolution {self.images.resolution} is below precompute.resolution")
        if "latents" in wanted.columns and autoencoder is not None and wanted.resolution != autoencoder.data.resolution:
            raise ValueError(f"precompute.resolution must be {autoencoder.data.resolution}, that of the autoencoder")
        least = 0 if "latents" in wanted.columns else (autoencoder or self.base).data.resolution
        if self.diffusion_prior is not None and "image_embedding" not in wanted.columns:
            least = max(least, self.diffusion_prior.data.resolution)
        if wanted.kept < least:
            raise ValueError(f"precompute.kept_resolution must be at least {least}, what is read of its images")
        return self


def diffusion_branch(recipe: DiffusionBranchRecipe) -> Workflow:
    """DDPM, cascades, latent diffusion, Imagen and DALL-E 2: what of this there is, the recipe says."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    frozen: dict[str, Any] = {}
    if recipe.contrastive is not None:
        frozen["contrastive"] = Stage("contrastive", train_contrastive, recipe.contrastive, images=images)
    if recipe.text_encoder is not None:
        frozen["text_encoder"] = Stage("text_encoder", import_text_encoder, recipe.text_encoder)
    first = {**frozen}  # of the base alone
    if recipe.autoencoder is not None:
        name = autoencoder_name(recipe.autoencoder)
        first["autoencoder"] = Stage(name, train_autoencoder, recipe.autoencoder, images=images)

    encoded, made = images, []  # what frozen networks make of the images, at each step or once for all
    if recipe.precompute is not None:
        encoded = Stage("precompute", precompute, recipe.precompute, images=images, **first)
        made.append(encoded)
    base = Stage("base", train_diffusion, recipe.base, images=encoded, **first)
    upsamplers = [
        Stage(f"upsampler_{u.data.resolution}", train_diffusion, u, images=images, **frozen) for u in recipe.upsamplers
    ]

    helpers: dict[str, Stage] = {}
    if recipe.diffusion_prior is not None:
        inputs = {"images": encoded, "contrastive": frozen["contrastive"]}
        helpers["diffusion_prior"] = Stage("diffusion_prior", train_diffusion_prior, recipe.diffusion_prior, **inputs)
    if recipe.classifier is not None:
        helpers["classifier"] = Stage("classifier", train_classifier, recipe.classifier, images=images)

    if recipe.weaker is not None:
        helpers["weaker"] = Stage("weaker", train_diffusion, recipe.weaker, images=encoded, **first)

    parts: dict[str, Any] = {**first, **helpers, "base": base, "upsamplers": upsamplers}
    cascade = Stage("cascade", compose_cascade, recipe.sampling, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)
    stages = [images, *first.values(), *made, *helpers.values(), base, *upsamplers, cascade, samples, evaluation]
    return Workflow(recipe.name, stages)
