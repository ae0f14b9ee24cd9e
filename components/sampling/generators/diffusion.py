"""Base and upsamplers of the diffusion branch, in fp32, with a random stream for each image.

Shapes: B images, H = W resolution. Images are float32 (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from components.configuration.sampling import NOISE_LEVEL, DiffusionSampling
from components.models.autoencoder import Autoencoder
from components.models.diffusion import samplers
from components.models.diffusion.corruption import augment_low_res, quantize_8_bit, upsample
from components.models.diffusion.degradation import MASK_TASKS
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import Objective, make_objective
from components.models.diffusion.samplers import Denoise, Score, sample
from components.models.diffusion.schedule import make_schedule
from components.sampling.frozen_conditions import check_prior_steps, frozen_conditions
from components.sampling.generator import Between, ConditionImages, Generator, Hooks, Parts
from components.sampling.given_images import given_in_mask, known_pixels
from components.sampling.guides import check_guides, check_weaker, classifier_score
from components.sampling.image_files import gray_png
from components.sampling.model import SamplingModel, in_slices, takes_condition_image
from components.sampling.plan import (
    Conditions,
    Plan,
    check_conditions,
    check_prompt_length,
    encode_conditions,
    random_stream,
)
from components.sampling.requests import Request, class_id

NOTHING = Conditions({}, {})
MOST_STEPS = 1000  # of a process without training steps


def sample_base(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    frozen: Conditions = NOTHING,
    classifier: SamplingModel | None = None,
    weaker: SamplingModel | None = None,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Samples images (B, 3, H, W) of plans with equal sampling settings.

    The settings of the first plan count.

    Args:
        frozen: what `frozen_conditions` makes of them, for a model that takes such.
        classifier: of noisy images; its gradient towards each plan's label guides.
        weaker: a weaker version of the model; what it would make is moved away from.

    Raises ValueError for an unknown sampler, or steps that are out of its range.
    """
    return denoise(
        model,
        plans,
        {},
        noise_of(model, plans),
        plans[0].of(model),
        frozen=frozen,
        score=None if classifier is None else score_of(classifier, plans),
        weaker=weaker,
        known=known_pixels(model, plans),
        on_step=on_step,
    )


def score_of(classifier: SamplingModel, plans: Sequence[Plan]) -> Score | None:
    """Returns the pull towards the plans' labels, at the classifier's scale; None for a scale of 0."""
    scale = plans[0].of(classifier).guidance_scale
    if scale == 0:
        return None
    return classifier_score(classifier, encode_conditions(classifier, plans).condition["label"], scale)


def check_sampling(model: SamplingModel, sampling: DiffusionSampling, *, has_weaker: bool = False) -> None:
    """Raise ValueError, in one line, for steps, noise or guidance that the model can't sample with."""
    limit, steps = model.settings["objective"].get("num_train_timesteps", MOST_STEPS), sampling.num_inference_steps
    if steps > limit:
        raise ValueError(f"{model.name}: steps must be in [1, {limit}], not {steps}")
    most = model.settings.get("max_noise_level", 0)
    if sampling.noise_level is not None and sampling.noise_level > most:
        raise ValueError(f"{model.name}: noise_level must be in [0, {most}], not {sampling.noise_level}")
    if sampling.strength < 1 and "low_res_resolution" not in model.settings:
        raise ValueError(f"{model.name}: strength must be 1: only an upsampler has an image to start from")
    if sampling.autoguidance_scale != 1 and not has_weaker:
        raise ValueError(f"{model.name}: autoguidance_scale must be 1: this cascade has no weaker model of it")


def sample_upsampler(
    model: SamplingModel,
    plans: Sequence[Plan],
    low_res: Tensor,
    *,
    frozen: Conditions = NOTHING,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Enlarge low_res (B, 3, h, w) to (B, 3, H, W).

    Guidance scale, steps and noise level are the upsampler's own. The images of the stage before are rounded to 8 bits
    first, as those that the upsampler was trained on, and then noised to a fixed level (noise conditioning
    augmentation; Ho et al., 2022, section 4.2). With a strength below 1 they are also what sampling starts from: the
    highest noise levels would only find again what low_res shows.
    """
    noise = noise_of(model, plans)
    enlarged = upsample(quantize_8_bit(low_res).to(model.device), model.settings["resolution"])
    sampling, learned = plans[0].of(model), model.settings
    chosen = min(NOISE_LEVEL, learned["max_noise_level"]) if sampling.noise_level is None else sampling.noise_level
    level = torch.full((len(plans),), chosen, device=model.device)
    schedule = make_schedule(learned["augmentation_schedule"], num_train_timesteps=learned["augmentation_steps"])
    low_res = augment_low_res(schedule, enlarged, noise(-1), level)
    return denoise(
        model,
        plans,
        {"low_res": low_res, "noise_level": level},
        noise,
        sampling,
        frozen=frozen,
        on_step=on_step,
        start=samplers.Start(enlarged, sampling.steps_taken) if sampling.strength < 1 else None,
    )


def objective_of(model: SamplingModel) -> Objective:
    """Returns the forward process and prediction of a diffusion model's training."""
    return make_objective(model.settings["objective"])


def denoise(
    model: SamplingModel,
    plans: Sequence[Plan],
    extra: dict[str, Tensor],
    noise: Callable[[int], Tensor],
    sampling: DiffusionSampling,
    *,
    frozen: Conditions = NOTHING,
    on_step: samplers.OnStep | None,
    score: Score | None = None,
    weaker: SamplingModel | None = None,
    known: samplers.Known | None = None,
    start: samplers.Start | None = None,
    around: Callable[[Denoise], Denoise] = lambda network: network,
) -> Tensor:
    """Images (B, 3, H, W) of plans.

    Args:
        extra: conditions that are never null.
        noise: the next noise (B, 3, H, W), x_T first.
        weaker: takes the place of no condition where the sampling has an autoguidance_scale.
        known: pixels that are kept.
        start: images that are noised in place of noise alone.
        around: what is done to the guided network before it is sampled from.
    """
    condition, null = encode_conditions(model, plans)
    objective = objective_of(model)
    away = weaker if sampling.autoguidance_scale != 1 else None
    network = guide(
        objective,
        model.module,
        condition | frozen.condition | extra,
        null | frozen.null,
        sampling.guidance_scale if away is None else sampling.autoguidance_scale,
        weaker=None if away is None else away.module,
        interval=sampling.guidance_interval,
        rescale=sampling.guidance_rescale,
    )
    return sample(
        around(network),
        objective,
        noise(-1),
        noise=noise,
        score=score,
        known=known,
        start=start,
        on_step=on_step,
        **sampling_arguments(sampling),
    )


def sampling_arguments(sampling: DiffusionSampling) -> dict[str, Any]:
    """Arguments of `components.models.diffusion.samplers.sample`."""
    names = {"sampler", "num_inference_steps", "eta", "spacing", "threshold"}
    return sampling.model_dump(include=names) | {"percentile": sampling.threshold_percentile}


def noise_of(model: SamplingModel, plans: Sequence[Plan]) -> Callable[[int], Tensor]:
    """Draw the next noise (B, 3, H, W): row i from the stream of plan i, whatever else is in the batch."""
    streams = [random_stream(plan.seed, model.name) for plan in plans]
    shape = (model.network.get("in_channels", 3), model.settings["resolution"], model.settings["resolution"])

    def noise(step: int) -> Tensor:
        del step  # the order of the draws is what counts
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(model.device)

    return noise


def sample_guided(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    scale: float,
    weaker: SamplingModel | None = None,
    classifier: SamplingModel | None = None,
    unconditional: bool = False,
    interval: tuple[float, float] | None = None,
) -> Tensor:
    """Samples images (B, C, H, W) of plans with equal sampler and steps.

    The settings of the first plan count.

    Args:
        scale: of the guidance: 0 is none by a classifier, 1 is none otherwise.
        weaker: takes the place of the model without condition (autoguidance; Karras et al., 2024).
        classifier: of noisy images; its gradient towards each plan's label guides (Dhariwal and Nichol, 2021).
        interval: guide at these noise levels only, sigma / signal (Kynkäänniemi et al., 2024).
        unconditional: with a classifier, the model itself is told no condition.

    The same plan gives the same image in whatever batch.
    """
    objective = objective_of(model)
    condition, null = encode_conditions(model, plans)
    noise, score, branches = noise_of(model, plans), None, scale
    if classifier is not None:
        branches = 1.0  # the network runs on one condition alone
        score = classifier_score(classifier, condition["label"], scale) if scale != 0 else None
    return sample(
        guide(
            objective,
            model.module,
            null if unconditional else condition,
            null,
            branches,
            weaker=None if weaker is None else weaker.module,
            interval=interval,
        ),
        objective,
        noise(-1),
        noise=noise,
        score=score,
        **sampling_arguments(plans[0].of(model)),
    )


class Diffusion(Generator):
    """Prompt -> frozen text encoder -> prior -> base -> decoder -> upsamplers.

    The frozen text encoder, the diffusion prior, the autoencoder's decoder and the upsamplers are optional.
    """

    name, title = "diffusion", "Diffusion"
    shows_steps = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        made = parts.autoencoder or self.first
        for upsampler in parts.upsamplers:
            takes, makes = upsampler.settings["low_res_resolution"], made.settings["resolution"]
            if takes != makes:
                raise ValueError(f"{upsampler.name} enlarges {takes}² images, the stage before it makes {makes}²")
            made = upsampler
        if ("latent_scale" in self.first.settings) != (parts.autoencoder is not None):
            raise ValueError("a base that makes latents and the autoencoder of those latents need each other")
        if parts.classifier is not None:
            check_guides(parts.classifier, self.first)
        if parts.weaker is not None:
            check_weaker(parts.weaker, self.first)

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        return parts.base

    @property
    def models(self) -> tuple[SamplingModel, ...]:
        others = (self.parts.diffusion_prior, self.parts.classifier, *self.parts.upsamplers)
        return (self.first, *(model for model in others if model is not None))

    @property
    def sides(self) -> list[int]:
        models = (self.first, self.parts.autoencoder, *self.parts.upsamplers)
        return [model.settings["resolution"] for model in models if model is not None]

    @property
    def classes(self) -> list[str]:
        """Names of the base's classes, or of the guiding classifier's for a base without classes."""
        return self.first.classes or ([] if self.parts.classifier is None else self.parts.classifier.classes)

    @property
    def condition_images(self) -> ConditionImages | None:
        if not takes_condition_image(self.first):
            return None
        return ConditionImages(self.first.settings["resolution"], self.first.settings["condition_member"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks on an image; only a base that makes pixels fills masks."""
        alone = self.parts.autoencoder is None and not self.parts.upsamplers
        return MASK_TASKS if alone and self.first.network.get("in_channels", 3) == 3 else ()

    def resolve(self, request: Request) -> Plan:
        """Resolves a request; upsamplers enlarge the base's image and take the conditions they know."""
        parts = self.parts
        if request.classifier_scale is not None and parts.classifier is None:
            raise ValueError("classifier_scale needs a cascade with a classifier, which guides its base")
        if request.prompt is not None and parts.contrastive is not None:
            check_prompt_length(parts.contrastive.text, request.prompt)
        for_base = request
        if request.label is not None and not self.first.classes and self.classes:
            class_id(request.label, self.classes)
            for_base = request.replace(label=None)  # only the classifier is conditioned on the label
        given = None
        if request.image is not None or request.mask is not None or request.task is not None:
            if parts.autoencoder is not None or parts.upsamplers:
                raise ValueError(
                    "pixels are kept by a base of images alone: this cascade decodes or enlarges what it made"
                )
            given = given_in_mask(self.first, request)
        check_conditions(self.first, for_base)
        plan = self.plan_of(request, given=given)
        check_sampling(self.first, plan.of(self.first), has_weaker=parts.weaker is not None)
        for upsampler in parts.upsamplers:
            check_sampling(upsampler, plan.of(upsampler))
        if parts.diffusion_prior is not None:
            check_prior_steps(parts.diffusion_prior, plan.of(parts.diffusion_prior))
        return plan

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Makes the images of each stage: first the base's images, then each upsampler's."""
        shown, parts = hooks.of_stage("base", self.image), self.parts
        base = sample_base(
            self.first,
            plans,
            frozen=self.frozen_conditions(self.first, plans, between=hooks.between),
            classifier=parts.classifier,
            weaker=parts.weaker,
            on_step=shown,
        )
        images = {"base": self.image(base)}
        for model in parts.upsamplers:
            low_res = list(images.values())[-1]
            frozen = self.frozen_conditions(model, plans, between=hooks.between)
            shown = hooks.of_stage(model.name)
            images[model.name] = sample_upsampler(model, plans, low_res, frozen=frozen, on_step=shown)
        return images

    def image(self, made: Tensor) -> Tensor:
        """Decodes the base's output to images (B, 3, H, W)."""
        if self.parts.autoencoder is None:
            return made
        decoder = self.parts.autoencoder.module
        assert isinstance(decoder, Autoencoder)
        latents, side = made / self.first.settings["latent_scale"], self.parts.autoencoder.settings["resolution"]
        return in_slices(decoder.from_latents, latents, resolution=side)

    def frozen_conditions(self, model: SamplingModel, plans: Sequence[Plan], *, between: Between | None) -> Conditions:
        """Returns the plans' conditions for a model, computed by the frozen networks."""
        parts = self.parts
        text = parts.contrastive if parts.diffusion_prior else parts.text_encoder or parts.contrastive
        return frozen_conditions(model, plans, text=text, prior=parts.diffusion_prior, between=between)

    def example(self) -> Request:
        request = super().example().replace(steps=10)
        if self.parts.weaker is None:
            request = request.replace(guidance_scale=2.0)
        if self.parts.classifier is not None:
            request = request.replace(label="0", classifier_scale=1.0)
        side = self.condition_images
        return request if side is None else request.replace(condition=gray_png(side.resolution))
