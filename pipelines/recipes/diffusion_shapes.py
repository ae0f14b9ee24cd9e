"""Shapes of recipes of diffusion models, and checks of facts that stages share.

A check raises ValueError and names the field.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import (
    CascadeSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    check_guide,
)
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.restoration import RestorationConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import PrecomputeConfig, TextEncoderConfig
from components.stages.samples import SamplesConfig


def refuse(wrong: bool, message: str) -> None:
    """Raise ValueError with the message if something is wrong."""
    if wrong:
        raise ValueError(message)


class RecipeOfImages(Config):
    """Parts of every recipe: workflow, name and images."""

    workflow: str
    name: str
    images: ImagesConfig

    def check_images(self, side: int, name: str) -> None:
        """Raise ValueError for images smaller than `side` pixels, the resolution that `name` says."""
        own = self.images.resolution
        refuse(own < side, f"images.resolution {own} must be at least {side}, {name}")


class DiffusionBranchRecipe(RecipeOfImages):
    """A base, any number of upsamplers, and optional networks from earlier trainings.

    With `autoencoder` the base makes latents (Stable Diffusion). With `text_encoder` or `contrastive` its condition is
    a frozen encoder's states of a text (Imagen); with `diffusion_prior` an embedding of the image that a text asks for
    (DALL-E 2).
    """

    workflow: Literal["diffusion_branch"] = "diffusion_branch"
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

    @property
    def learned(self) -> int:
        """Resolution of the images that the base learns from, in pixels."""
        return (self.autoencoder or self.base).data.resolution

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        side = check_cascade(self.base, self.upsamplers, self.sampling, first=self.learned)
        self.check_images(side, "the largest that a model makes")
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
        data, latent, threshold = self.base.data, self.autoencoder.network, self.sampling.base.threshold
        side, channels, of = self.learned // latent.factor, latent.diffused_channels, "the autoencoder's latents"
        refuse(data.resolution != side, f"base.data.resolution must be {side}, the side of {of}")
        refuse(data.in_channels != channels, f"base.data.in_channels must be {channels}, those of {of}")
        refuse(threshold != "none", "sampling.base.threshold must be none: latents have no range to be clipped to")
        refuse(self.classifier is not None, "classifier knows images, the base makes latents: leave one of them out")
        return self

    @model_validator(mode="after")
    def _encoders_are_there(self) -> Self:
        contrastive, text, prior = (p is not None for p in (self.contrastive, self.text_encoder, self.diffusion_prior))
        conditions = {name for model in (self.base, *self.upsamplers) for name in model.conditioning.conditions}
        states, embedding = ("text_states" in conditions and not contrastive), "image_embedding" in conditions
        refuse(states and not text, "text_states among the conditions need contrastive or text_encoder")
        if embedding and not (contrastive and prior):
            raise ValueError("image_embedding among the conditions needs contrastive and diffusion_prior")
        refuse(prior and not embedding, "diffusion_prior makes image_embedding, which is among no model's conditions")
        refuse(prior and text, "contrastive reads the prompts of a diffusion_prior: leave text_encoder out")
        return self

    @model_validator(mode="after")
    def _encoders_fit(self) -> Self:
        if (encoder := self.contrastive) is None:
            return self
        dims = {"image_embedding": encoder.network.embedding_dim}
        if self.text_encoder is None:
            dims["text_states"] = encoder.text.text_dim
        models = {"base": self.base} | {f"upsamplers.{n}": upsampler for n, upsampler in enumerate(self.upsamplers)}
        for where, model in models.items():
            for name in dims.keys() & {*model.conditioning.conditions}:
                wrong = getattr(model.conditioning, f"{name}_dim") not in (None, dims[name])
                refuse(wrong, f"{where}.{name}_dim must be {dims[name]}, as contrastive makes it")
        seen, prior, used = encoder.data.resolution, self.diffusion_prior, self.base.conditioning.conditions
        too_large = "image_embedding" in used and self.learned < seen
        if prior is not None and prior.data.resolution < seen:
            raise ValueError(f"diffusion_prior.resolution must be at least contrastive.resolution {seen}")
        refuse(too_large, f"contrastive.resolution must be at most {self.learned}, that of the images base learns from")
        return self

    @model_validator(mode="after")
    def _precompute_fits(self) -> Self:
        if (once := self.precompute) is None:
            return self
        makers = {"latents": self.autoencoder, "text_states": self.contrastive or self.text_encoder}
        for column in once.columns:
            fault = f"{column} among precompute.columns has no model that makes it in this recipe"
            refuse(makers.get(column, self.contrastive) is None, fault)
        self.check_images(once.resolution, "precompute.resolution")
        encoded, side = "latents" in once.columns, self.learned
        least = 0 if encoded else side
        if self.diffusion_prior is not None and "image_embedding" not in once.columns:
            least = max(least, self.diffusion_prior.data.resolution)
        refuse(encoded and once.resolution != side, f"precompute.resolution must be {side}, that of the autoencoder")
        refuse(once.kept < least, f"precompute.kept_resolution must be at least {least}, what is read of its images")
        return self


class ImageToImageRecipe(RecipeOfImages):
    """A model, and held-out images that the model restores."""

    workflow: Literal["image_to_image"] = "image_to_image"
    model: DiffusionTraining
    sampling: RestorationSampling = RestorationSampling()
    restoration: RestorationConfig

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        self.check_images(self.model.data.resolution, "model.resolution")
        check_steps("sampling.model", self.sampling.model, self.model)
        refuse(self.model.degradation is None, "model.degradation is missing: what it restores")
        if self.images.holdout_fraction == 0:
            raise ValueError("images.holdout_fraction must be above 0: held-out images are restored")
        return self


class DiffusionStudiesRecipe(RecipeOfImages):
    """A diffusion model with studies: noising, likelihood, distance by steps, guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    base: DiffusionTraining
    weaker: DiffusionTraining | None = None  # guides the base: smaller, or trained for fewer steps
    classifier: ClassifierTraining | None = None  # of noisy images, guides the base
    judge: ClassifierTraining | None = None  # of clean images, guides nothing
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    noising_study: NoisingStudyConfig | None = None
    likelihood: LikelihoodConfig | None = None
    steps_study: StepsStudyConfig | None = None
    guidance_study: GuidanceStudyConfig | None = None
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _models_fit(self) -> Self:
        check_channels(self.base)
        side, own = check_cascade(self.base, (), self.sampling), self.images.resolution
        for name, model in {"classifier": self.classifier, "judge": self.judge}.items():
            refuse(side != (model or self.base).data.resolution, f"{name}.resolution must be base.resolution {side}")
        self.check_images(side, "base.resolution")
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        if self.classifier is not None:
            check_guide(self.classifier, self.base)
        noised = 0 if self.noising_study is None else self.noising_study.resolution or side
        noisy = self.judge is not None and self.judge.noisy
        refuse(own < noised, f"noising_study.resolution must be at most images.resolution {own}")
        refuse(noisy, "judge.noisy must be false: it judges finished images")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        process = self.base.process
        if not isinstance(process, DiscreteProcess):
            for name in ("likelihood", "noising_study"):
                refuse(getattr(self, name) is not None, f"{name} needs base.process discrete, not {process.kind}")
            return self
        most, counts = process.num_train_timesteps, dict[str, int]()
        if self.likelihood is not None:
            count = self.likelihood.timesteps_per_image or most
            refuse(not 2 <= count <= most, f"likelihood.timesteps_per_image must be in [2, {most}], not {count}")
        if (study := self.steps_study) is not None:
            counts = {"steps_study.steps": max(study.steps), "steps_study.reference_steps": study.reference_steps}
        if self.guidance_study is not None:
            counts["guidance_study.num_inference_steps"] = self.guidance_study.num_inference_steps
        for name, steps in counts.items():
            refuse(steps > most, f"{name} must be at most base.num_train_timesteps {most}, not {steps}")
        return self

    @model_validator(mode="after")
    def _a_guidance_study_has_its_models(self) -> Self:
        if self.guidance_study is None:
            return self
        methods = self.guidance_study.methods
        by_classifier = bool({"classifier", "classifier_unconditional"} & {*methods})
        needs = {"judge": True, "weaker": "autoguidance" in methods, "classifier": by_classifier}
        for name, needed in needs.items():
            missing = needed and getattr(self, name) is None
            refuse(missing, f"{name} is missing: guidance_study.methods {list(methods)} need it")
        labels = "label" in self.base.conditioning.conditions
        refuse(not labels, "base.conditions must hold label: guidance_study asks for classes")
        return self


def check_cascade(
    base: DiffusionTraining,
    upsamplers: Sequence[DiffusionTraining],
    sampling: CascadeSampling | DiffusionBranchSampling,
    *,
    first: int | None = None,
) -> int:
    """Resolution of the last stage's images, in pixels.

    Args:
        first: resolution of the base's images, in pixels; None: that of its data.

    Raises ValueError for a stage that does not fit the one before it, or whose sampling it can't do.
    """
    if base.low_res is not None or base.degradation is not None:
        raise ValueError("base.low_res and base.degradation must be empty: the base model starts from noise alone")
    check_steps("sampling.base", sampling.base, base)
    count, side = len(upsamplers), base.data.resolution if first is None else first
    refuse(len(sampling.upsamplers) != count, f"sampling.upsamplers must be as many as upsamplers, {count}")
    for number, (upsampler, own) in enumerate(zip(upsamplers, sampling.upsamplers, strict=True)):
        low_res, where = upsampler.low_res, f"sampling.upsamplers.{number}"
        if low_res is None or low_res.low_res_resolution != side:
            raise ValueError(f"upsamplers.{number}.low_res_resolution must be {side}, what the stage before it makes")
        check_steps(where, own, upsampler)
        most = low_res.max_noise_level
        refuse((own.noise_level or 0) > most, f"{where}.noise_level must be at most {most}")
        side = upsampler.data.resolution
    return side


def check_channels(base: DiffusionTraining, upsamplers: Sequence[DiffusionTraining] = ()) -> None:
    """Raise ValueError for a base of images, not latents, with other channels than images have."""
    channels, place = base.data.in_channels, "base.data.in_channels must be 3"
    gray = f"{place}, or 1 for gray images, not {channels}: others are of latents"
    color = f"{place}: upsamplers enlarge images in color"
    refuse(channels not in (1, 3), gray)
    refuse(channels == 1 and bool(upsamplers), color)


def check_weaker(weaker: DiffusionTraining, base: DiffusionTraining) -> None:
    """Raise ValueError for a weaker model of other images, conditions or outputs than the base."""

    def facts(model: DiffusionTraining) -> dict[str, Any]:
        conditions, own = [*model.conditioning.conditions], model.data
        sizes = {"resolution": own.resolution, "in_channels": own.in_channels}
        return {**sizes, "conditions": conditions, "process": model.process}

    needed = facts(base)
    for name, own in facts(weaker).items():
        refuse(own != needed[name], f"weaker.{name} must be base.{name} {needed[name]}")


def check_steps(where: str, sampling: DiffusionSampling, model: DiffusionTraining) -> None:
    """Raise ValueError for more steps than the model's, or a spacing without the last step."""
    if not isinstance(process := model.process, DiscreteProcess):
        return
    most, skips = process.num_train_timesteps, process.zero_terminal_snr and sampling.spacing == "leading"
    if sampling.num_inference_steps > most:
        raise ValueError(f"{where}.num_inference_steps must be at most num_train_timesteps {most}")
    refuse(skips, f"{where}.spacing must not be leading: it skips the last step of zero_terminal_snr")
