"""Shapes of recipes of diffusion models, and checks of facts that stages share.
A check raises ValueError and names the field."""

from collections.abc import Sequence
from typing import Any, Literal

from components.configuration import trainings
from components.configuration.config import Config, refuse
from components.configuration.diffusion import DiffusionTraining, DiscreteProcess
from components.configuration.sampling import (
    CascadeSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.obedience import SIDE, ObedienceConfig, SceneJudgeConfig
from components.evaluation.restoration import RestorationConfig
from components.evaluation.sampling_studies import GuidanceStudyConfig, StagesStudyConfig, StepsStudyConfig
from components.models.diffusion.steps import spaced_timesteps
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import PrecomputeConfig, TextEncoderConfig
from components.stages.samples import SamplesConfig
from components.training.subject import SubjectConfig


class ObedienceRecipe(Config):
    """A judge of scenes, and what it reads in images asked for by held-out captions."""

    judge: SceneJudgeConfig = SceneJudgeConfig()
    measure: ObedienceConfig = ObedienceConfig()


class RecipeOfImages(Config):
    """Parts of every recipe: workflow, name and images."""

    workflow: str
    name: str
    images: ImagesConfig

    def check_obedience(self, recipe: ObedienceRecipe | None, conditions: Sequence[str], side: int) -> None:
        """Raise ValueError for images that are no scenes, no captions, or a side below the judge's."""
        if recipe is not None:
            other, captioned = self.images.source, {"text", "text_states", "image_embedding"} & {*conditions}
            remedy = "; take --recipe openmoji, or set obedience=null"
            refuse(other != "scenes", f"obedience is to captions of scenes, not of {other}{remedy}")
            refuse(not captioned, "obedience needs text among the conditions; set obedience=null")
            refuse(side < SIDE, f"obedience is judged at {SIDE} pixels, more than the {side} made; set obedience=null")

    def check_images(self, side: int, name: str) -> None:
        """Raise ValueError for images smaller than `side` pixels, the resolution that `name` says."""
        own = self.images.resolution
        refuse(own < side, f"images.resolution {own} must be at least {side}, {name}")


class DiffusionBranchRecipe(RecipeOfImages):
    """A base, any number of upsamplers, and optional networks from earlier trainings.
    With `autoencoder` the base makes latents (Stable Diffusion), with `text_encoder` or `contrastive` it reads states
    of a text (Imagen), with `diffusion_prior` an embedding of an image (DALL-E 2)."""

    workflow: Literal["diffusion_branch"] = "diffusion_branch"
    subject: SubjectConfig | None = None  # a few images beside samples of the start (DreamBooth)
    autoencoder: trainings.AutoencoderTraining | None = None
    contrastive: trainings.ContrastiveTraining | None = None
    text_encoder: TextEncoderConfig | None = None
    diffusion_prior: trainings.DiffusionPriorTraining | None = None
    precompute: PrecomputeConfig | None = None  # columns of frozen networks, made once
    classifier: trainings.ClassifierTraining | None = None  # of noisy images; guides the base
    weaker: DiffusionTraining | None = None  # guides the base
    base: DiffusionTraining
    upsamplers: tuple[DiffusionTraining, ...] = ()
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig
    obedience: ObedienceRecipe | None = None  # to captions of scenes
    stages_study: StagesStudyConfig | None = None

    @property
    def learned(self) -> int:
        """Resolution of the images that the base learns from, in pixels."""
        return (self.autoencoder or self.base).data.resolution

    def _check(self) -> None:
        sampling = self.sampling.base
        side = check_cascade(self.base, self.upsamplers, self.sampling, first=self.learned)
        self.check_images(side, "the largest that a model makes")
        self.check_obedience(self.obedience, self.base.conditioning.conditions, side)
        if self.classifier is not None:
            trainings.check_guide(self.classifier, self.base)
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        unguided = self.weaker is None and sampling.autoguidance_scale != 1
        refuse(unguided, "sampling.base.autoguidance_scale must be 1: there is no weaker model to be guided by")
        if self.autoencoder is None:
            check_channels(self.base, self.upsamplers)
        else:
            data, latent, of = self.base.data, self.autoencoder.network, "the autoencoder's latents"
            side, channels = self.learned // latent.factor, latent.diffused_channels
            refuse(data.resolution != side, f"base.data.resolution must be {side}, the side of {of}")
            refuse(data.in_channels != channels, f"base.data.in_channels must be {channels}, those of {of}")
            fault = "sampling.base.threshold must be none: latents have no range to be clipped to"
            refuse(sampling.threshold != "none", fault)
        if self.subject is not None:
            refuse(self.base.init_from is None, "base.init_from.uri is missing: subject is learned beside its samples")
            others = (self.contrastive, self.upsamplers, self.weaker, self.classifier)
            refuse(any(others), "subject is for a base alone: leave other models out")
            trained = self.autoencoder is not None and self.autoencoder.trains
            refuse(trained, "autoencoder must be that of the base that is sampled: set autoencoder.init_from.frozen")
        if self.stages_study is not None:
            refuse(not self.upsamplers, "stages_study must be empty: there is no upsampler, so no stages to compare")
            for model in (self.base, *self.upsamplers):
                if isinstance(model.process, DiscreteProcess):
                    most, steps = model.process.num_train_timesteps, max(self.stages_study.steps)
                    refuse(steps > most, f"stages_study.steps must be at most num_train_timesteps {most}, not {steps}")
        self._check_encoders()
        if self.precompute is not None:
            self._check_precompute(self.precompute)

    def _check_encoders(self) -> None:
        contrastive, text, prior = self.contrastive, self.text_encoder, self.diffusion_prior
        models = {"base": self.base} | {f"upsamplers.{n}": upsampler for n, upsampler in enumerate(self.upsamplers)}
        conditions = {name for model in models.values() for name in model.conditioning.conditions}
        unknown = "text_states" in conditions and not (contrastive or text)
        refuse(unknown, "text_states among the conditions need contrastive or text_encoder")
        embedding = "image_embedding" in conditions
        fault = "image_embedding among the conditions needs contrastive and diffusion_prior"
        refuse(embedding and not (contrastive and prior), fault)
        fault = "diffusion_prior makes image_embedding, which is among no model's conditions"
        refuse(prior and not embedding, fault)
        refuse(prior and text, "contrastive reads the prompts of a diffusion_prior: leave text_encoder out")
        if contrastive is None:
            return
        dims = {"image_embedding": contrastive.network.embedding_dim}
        if text is None:
            dims["text_states"] = contrastive.text.text_dim
        for where, model in models.items():
            for name in dims.keys() & {*model.conditioning.conditions}:
                wrong = getattr(model.conditioning, f"{name}_dim") not in (None, dims[name])
                refuse(wrong, f"{where}.{name}_dim must be {dims[name]}, as contrastive makes it")
        seen = contrastive.data.resolution
        small = prior is not None and prior.data.resolution < seen
        refuse(small, f"diffusion_prior.resolution must be at least contrastive.resolution {seen}")
        small = "image_embedding" in self.base.conditioning.conditions and self.learned < seen
        refuse(small, f"contrastive.resolution must be at most {self.learned}, that of the images base learns from")

    def _check_precompute(self, once: PrecomputeConfig) -> None:
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


class ImageToImageRecipe(RecipeOfImages):
    """A model, and held-out images that the model restores."""

    workflow: Literal["image_to_image"] = "image_to_image"
    model: DiffusionTraining
    sampling: RestorationSampling = RestorationSampling()
    restoration: RestorationConfig

    def _check(self) -> None:
        self.check_images(self.model.data.resolution, "model.resolution")
        check_steps("sampling.model", self.sampling.model, self.model)
        refuse(self.model.degradation is None, "model.degradation is missing: what it restores")
        fault = "images.holdout_fraction must be above 0: held-out images are restored"
        refuse(self.images.holdout_fraction == 0, fault)


class DiffusionStudiesRecipe(RecipeOfImages):
    """A diffusion model with studies: noising, likelihood, distance by steps, guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    base: DiffusionTraining
    weaker: DiffusionTraining | None = None  # guides the base
    classifier: trainings.ClassifierTraining | None = None  # of noisy images, guides the base
    judge: trainings.ClassifierTraining | None = None  # of clean images, guides nothing
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    noising_study: NoisingStudyConfig | None = None
    likelihood: LikelihoodConfig | None = None
    steps_study: StepsStudyConfig | None = None
    guidance_study: GuidanceStudyConfig | None = None
    evaluation: EvaluationConfig

    def _check(self) -> None:
        check_channels(self.base)
        side, own = check_cascade(self.base, (), self.sampling), self.images.resolution
        for name, model in {"classifier": self.classifier, "judge": self.judge}.items():
            refuse(side != (model or self.base).data.resolution, f"{name}.resolution must be base.resolution {side}")
        self.check_images(side, "base.resolution")
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        if self.classifier is not None:
            trainings.check_guide(self.classifier, self.base)
        noised = 0 if self.noising_study is None else self.noising_study.resolution or side
        refuse(own < noised, f"noising_study.resolution must be at most images.resolution {own}")
        refuse(self.judge is not None and self.judge.noisy, "judge.noisy must be false: it judges finished images")
        self._check_steps()
        if (study := self.guidance_study) is None:
            return
        by_classifier = {"classifier", "classifier_unconditional"} & {*study.methods}
        needs = {"judge": True, "weaker": "autoguidance" in study.methods, "classifier": by_classifier}
        for name, needed in needs.items():
            missing = needed and getattr(self, name) is None
            refuse(missing, f"{name} is missing: guidance_study.methods {list(study.methods)} need it")
        labels = "label" in self.base.conditioning.conditions
        refuse(not labels, "base.conditions must hold label: guidance_study asks for classes")
        without = sorted({"classifier_free", "interval", "classifier_unconditional"} & {*study.methods})
        fault = f"base.cond_drop_prob must be above 0: guidance_study.methods {without} need a null label"
        refuse(without and self.base.conditioning.cond_drop_prob == 0, fault)

    def _check_steps(self) -> None:
        process = self.base.process
        if not isinstance(process, DiscreteProcess):
            for name in ("likelihood", "noising_study"):
                refuse(getattr(self, name) is not None, f"{name} needs base.process discrete, not {process.kind}")
            return
        most, counts = process.num_train_timesteps, dict[str, int]()
        if self.likelihood is not None:
            count = self.likelihood.timesteps_per_image or most
            refuse(not 2 <= count <= most, f"likelihood.timesteps_per_image must be in [2, {most}], not {count}")
        if (study := self.steps_study) is not None:
            refuse(self.sampling.base.eta > 0, "sampling.base.eta must be 0: steps_study compares samplers without it")
            counts = {"steps_study.steps": max(study.steps), "steps_study.reference_steps": study.reference_steps}
        if self.guidance_study is not None:
            counts["guidance_study.num_inference_steps"] = self.guidance_study.num_inference_steps
        for name, steps in counts.items():
            refuse(steps > most, f"{name} must be at most base.num_train_timesteps {most}, not {steps}")


def check_cascade(
    base: DiffusionTraining,
    upsamplers: Sequence[DiffusionTraining],
    sampling: CascadeSampling | DiffusionBranchSampling,
    *,
    first: int | None = None,
) -> int:
    """Resolution of the last stage's images, in pixels; `first`: of the base's, None: of its data.
    Raises ValueError for a stage that does not fit the one before it, or whose sampling it can't do."""
    fault = "base.low_res and base.degradation must be empty: the base model starts from noise alone"
    refuse(base.low_res or base.degradation, fault)
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
    refuse(channels not in (1, 3), f"{place}, or 1 for gray images, not {channels}: others are of latents")
    refuse(channels == 1 and upsamplers, f"{place}: upsamplers enlarge images in color")


def check_weaker(weaker: DiffusionTraining, base: DiffusionTraining) -> None:
    """Raise ValueError for a weaker model of other images, conditions or outputs than the base."""

    def facts(model: DiffusionTraining) -> dict[str, object]:
        data, conditions = model.data, [*model.conditioning.conditions]
        sizes = {"resolution": data.resolution, "in_channels": data.in_channels}
        return {**sizes, "conditions": conditions, "process": model.process}

    needed = facts(base)
    for name, own in facts(weaker).items():
        refuse(own != needed[name], f"weaker.{name} must be base.{name} {needed[name]}")


def check_null(where: str, sampling: Any, model: Any) -> None:
    """Raise ValueError for guidance without a null condition; a start's own may have been trained."""
    untrained = model.conditioning.cond_drop_prob == 0 and model.init_from is None
    refuse(
        getattr(sampling, "guidance_scale", 1) != 1 and untrained,
        f"{where}.guidance_scale must be 1: cond_drop_prob 0 trains no null to be guided from",
    )


def check_steps(where: str, sampling: DiffusionSampling, model: DiffusionTraining) -> None:
    """Raise ValueError for more steps than the model's, a spacing or guidance that does not fit it."""
    check_null(where, sampling, model)
    if not isinstance(process := model.process, DiscreteProcess):
        refuse(
            sampling.spacing is not None, f"{where}.spacing must be empty: a process {process.kind} has no such steps"
        )
        return
    most, steps, spacing = process.num_train_timesteps, sampling.num_inference_steps, sampling.spacing
    refuse(steps > most, f"{where}.num_inference_steps must be at most num_train_timesteps {most}")
    if spacing in (None, "karras"):
        return
    try:
        last = spaced_timesteps(most, steps, spacing=spacing)[-1]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    skips = process.zero_terminal_snr and last < most - 1
    refuse(skips, f"{where}.spacing must not be {spacing}: it skips the last step of zero_terminal_snr")
