"""Shapes of recipes of diffusion models, and checks of facts that stages share.

A check raises ValueError and names the field.
"""

from collections.abc import Sequence
from typing import Literal, Self

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
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.precompute import PrecomputeConfig, TextEncoderConfig
from components.stages.restoration import RestorationConfig
from components.stages.samples import SamplesConfig


class DiffusionBranchRecipe(Config):
    """A base, any number of upsamplers, and optional networks from earlier trainings.

    With `autoencoder` the base makes latents (Stable Diffusion). With `text_encoder` or `contrastive` its condition is
    a frozen encoder's states of a text (Imagen); with `diffusion_prior` an embedding of the image that a text asks for
    (DALL-E 2).
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
        first = (self.autoencoder or self.base).data.resolution
        side = check_cascade(self.base, self.upsamplers, self.sampling, first=first)
        if self.images.resolution < side:
            raise ValueError(f"images.resolution {self.images.resolution} is below {side}, which a model makes")
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
        conditions = {name for model in models for name in model.conditioning.conditions}
        if "text_states" in conditions and self.contrastive is None and self.text_encoder is None:
            raise ValueError("text_states among the conditions need contrastive or text_encoder")
        if "image_embedding" in conditions and (self.contrastive is None or self.diffusion_prior is None):
            raise ValueError("image_embedding among the conditions needs contrastive and diffusion_prior")
        if self.diffusion_prior is not None and "image_embedding" not in conditions:
            raise ValueError("diffusion_prior makes image_embedding, which is among no model's conditions")
        if self.diffusion_prior is not None and self.text_encoder is not None:
            raise ValueError("contrastive reads the prompts of a diffusion_prior: leave text_encoder out")
        return self

    @model_validator(mode="after")
    def _encoders_fit(self) -> Self:
        encoder, prior = self.contrastive, self.diffusion_prior
        if encoder is None:
            return self
        dims = {"image_embedding": encoder.network.embedding_dim}
        if self.text_encoder is None:
            dims["text_states"] = encoder.text.text_dim
        models = {"base": self.base} | {f"upsamplers.{n}": upsampler for n, upsampler in enumerate(self.upsamplers)}
        for where, model in models.items():
            for condition in dims.keys() & {*model.conditioning.conditions}:
                if getattr(model.conditioning, f"{condition}_dim") not in (None, dims[condition]):
                    raise ValueError(f"{where}.{condition}_dim must be {dims[condition]}, as contrastive makes it")
        seen = encoder.data.resolution
        if prior is not None and prior.data.resolution < seen:
            raise ValueError(f"diffusion_prior.resolution must be at least contrastive.resolution {seen}")
        learned = (self.autoencoder or self.base).data.resolution
        if "image_embedding" in self.base.conditioning.conditions and learned < seen:
            raise ValueError(f"contrastive.resolution must be at most {learned}, that of the images base learns from")
        return self

    @model_validator(mode="after")
    def _precompute_fits(self) -> Self:
        once, autoencoder = self.precompute, self.autoencoder
        if once is None:
            return self
        text = self.contrastive or self.text_encoder
        makers = {"latents": autoencoder, "image_embedding": self.contrastive, "text_states": text}
        for column in once.columns:
            if makers.get(column, self.contrastive) is None:
                raise ValueError(f"{column} among precompute.columns has no model that makes it in this recipe")
        if self.images.resolution < once.resolution:
            raise ValueError(f"images.resolution {self.images.resolution} is below precompute.resolution")
        if "latents" in once.columns and autoencoder is not None and once.resolution != autoencoder.data.resolution:
            raise ValueError(f"precompute.resolution must be {autoencoder.data.resolution}, that of the autoencoder")
        least = 0 if "latents" in once.columns else (autoencoder or self.base).data.resolution
        if self.diffusion_prior is not None and "image_embedding" not in once.columns:
            least = max(least, self.diffusion_prior.data.resolution)
        if once.kept < least:
            raise ValueError(f"precompute.kept_resolution must be at least {least}, what is read of its images")
        return self


class ImageToImageRecipe(Config):
    """A model, and held-out images that the model restores."""

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


class DiffusionStudiesRecipe(Config):
    """A diffusion model with studies: noising, likelihood, distance by steps, guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    name: str
    images: ImagesConfig
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
        side = check_cascade(self.base, (), self.sampling)
        for name in ("classifier", "judge"):
            model = getattr(self, name)
            if model is not None and model.data.resolution != side:
                raise ValueError(f"{name}.resolution must be base.resolution {side}")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least base.resolution {side}")
        if self.noising_study is not None and self.images.resolution < (self.noising_study.resolution or side):
            raise ValueError(f"noising_study.resolution must be at most images.resolution {self.images.resolution}")
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        if self.classifier is not None:
            check_guide(self.classifier, self.base)
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        process = self.base.process
        if not isinstance(process, DiscreteProcess):
            for name in ("likelihood", "noising_study"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs base.process discrete, not {process.kind}")
            return self
        most = process.num_train_timesteps
        if self.likelihood is not None:
            count = self.likelihood.timesteps_per_image or most
            if not 2 <= count <= most:
                raise ValueError(f"likelihood.timesteps_per_image must be in [2, {most}], not {count}")
        counts: dict[str, int] = {}
        if self.steps_study is not None:
            counts["steps_study.steps"] = max(self.steps_study.steps)
            counts["steps_study.reference_steps"] = self.steps_study.reference_steps
        if self.guidance_study is not None:
            counts["guidance_study.num_inference_steps"] = self.guidance_study.num_inference_steps
        for name, steps in counts.items():
            if steps > most:
                raise ValueError(f"{name} must be at most base.num_train_timesteps {most}, not {steps}")
        return self

    @model_validator(mode="after")
    def _a_guidance_study_has_its_models(self) -> Self:
        if self.guidance_study is None:
            return self
        methods = self.guidance_study.methods
        needs = {
            "judge": True,
            "weaker": "autoguidance" in methods,
            "classifier": "classifier" in methods or "classifier_unconditional" in methods,
        }
        for name, needed in needs.items():
            if needed and getattr(self, name) is None:
                raise ValueError(f"{name} is missing: guidance_study.methods {list(methods)} need it")
        if "label" not in self.base.conditioning.conditions:
            raise ValueError("base.conditions must hold label: guidance_study asks for classes")
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
    if len(sampling.upsamplers) != len(upsamplers):
        raise ValueError(f"sampling.upsamplers must be as many as upsamplers, {len(upsamplers)}")
    side = base.data.resolution if first is None else first
    for number, (upsampler, own) in enumerate(zip(upsamplers, sampling.upsamplers, strict=True)):
        low_res = upsampler.low_res
        if low_res is None or low_res.low_res_resolution != side:
            raise ValueError(f"upsamplers.{number}.low_res_resolution must be {side}, what the stage before it makes")
        check_steps(f"sampling.upsamplers.{number}", own, upsampler)
        if own.noise_level is not None and own.noise_level > low_res.max_noise_level:
            raise ValueError(f"sampling.upsamplers.{number}.noise_level must be at most {low_res.max_noise_level}")
        side = upsampler.data.resolution
    return side


def check_channels(base: DiffusionTraining, upsamplers: Sequence[DiffusionTraining] = ()) -> None:
    """Raise ValueError for a base of images, not latents, with other channels than images have."""
    channels = base.data.in_channels
    if channels not in (1, 3):
        raise ValueError(
            f"base.data.in_channels must be 3, or 1 for gray images, not {channels}: others are of latents"
        )
    if channels == 1 and upsamplers:
        raise ValueError("base.data.in_channels must be 3: upsamplers enlarge images in color")


def check_weaker(weaker: DiffusionTraining, base: DiffusionTraining) -> None:
    """Raise ValueError for a weaker model of other images, conditions or outputs than the base."""
    pairs = {
        "weaker.resolution": (weaker.data.resolution, "base.resolution", base.data.resolution),
        "weaker.in_channels": (weaker.data.in_channels, "base.in_channels", base.data.in_channels),
        "weaker.conditions": ([*weaker.conditioning.conditions], "base.conditions", [*base.conditioning.conditions]),
        "weaker.process": (weaker.process, "base.process", base.process),
    }
    for name, (value, other, needed) in pairs.items():
        if value != needed:
            raise ValueError(f"{name} must be {other} {needed}")


def check_steps(where: str, sampling: DiffusionSampling, model: DiffusionTraining) -> None:
    """Raise ValueError for more steps than the model's, or a spacing without the last step."""
    process = model.process
    if not isinstance(process, DiscreteProcess):
        return
    if sampling.num_inference_steps > process.num_train_timesteps:
        most = process.num_train_timesteps
        raise ValueError(f"{where}.num_inference_steps must be at most num_train_timesteps {most}")
    if process.zero_terminal_snr and sampling.spacing == "leading":
        raise ValueError(f"{where}.spacing must not be leading: it skips the last step of zero_terminal_snr")
