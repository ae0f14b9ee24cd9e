"""Base and upsamplers of the diffusion branch, in fp32, with a random stream for each image.

Known pixels of an image are kept by a model without training for it: they are put back at each step, as noisy as the
step is (Song et al., 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix I.2;
RePaint without its resampling: Lugmayr et al., 2022, equation 8). Of a cascade each stage keeps them in its size, of
latent diffusion the latents of whole patches, and then the pixels.

A base may be guided by a classifier of noisy images, or by a weaker model (autoguidance; Karras et al., 2024, "Guiding
a Diffusion Model with a Bad Version of Itself").

Shapes: B images, H = W = S resolution, K classes. Images are float32 (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.configuration.sampling import NOISE_LEVEL, DiffusionPriorSampling, DiffusionSampling
from components.models.diffusion import guidance, samplers
from components.models.diffusion.corruption import MASK_TASKS, augment_low_res, downsample, quantize_8_bit, upsample
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import Denoise, Known, Score, sample
from components.models.diffusion.schedule import make_schedule
from components.models.diffusion.steps import spaced_timesteps
from components.sampling.frozen_text import frozen_conditions
from components.sampling.generator import ConditionImages, Generator, Hooks, Parts
from components.sampling.image_files import gray_png
from components.sampling.model import SamplingModel, in_slices
from components.sampling.plan import (
    UNCONDITIONED,
    Conditions,
    Plan,
    check_conditions,
    class_id,
    encode_conditions,
    given_in_mask,
    noise_of,
)
from components.sampling.requests import Request

MOST_STEPS = 1000  # of a process without training steps
PROCESS = ("kind", "schedule", "beta_start", "beta_end", "num_train_timesteps", "zero_terminal_snr", "sigma_data")
Names = Sequence[str]
CONDITIONS = ("num_classes", "text", "text_states_dim", "image_embedding_dim", "condition_image_channels")
SHAPE = ("in_channels", *CONDITIONS)


def check_steps(model: SamplingModel, sampling: DiffusionSampling | DiffusionPriorSampling) -> None:
    """Raise ValueError, in one line, for more steps than in the model's training, or others."""
    objective, steps = model.settings["objective"], sampling.num_inference_steps
    trained = objective.get("num_train_timesteps")
    limit, spacing = trained or MOST_STEPS, getattr(sampling, "spacing", None)
    if steps > limit:
        raise ValueError(f"{model.name}: steps must be in [1, {limit}], not {steps}")
    if trained is None and spacing is not None:
        raise ValueError(f"{model.name}: spacing is of a process with training steps, which this model has not")
    if trained is not None and spacing not in (None, "karras"):
        last = spaced_timesteps(trained, steps, spacing=spacing)[-1]
        if objective.get("zero_terminal_snr") and last < trained - 1:
            raise ValueError(f"{model.name}: spacing {spacing} skips the last step of zero_terminal_snr")


def check_sampling(model: SamplingModel, sampling: DiffusionSampling, *, has_weaker: bool = False) -> None:
    """Raise ValueError, in one line, for steps, noise or guidance that the model can't sample with."""
    check_steps(model, sampling)
    most = model.settings.get("max_noise_level", 0)
    if sampling.noise_level is not None and sampling.noise_level > most:
        raise ValueError(f"{model.name}: noise_level must be in [0, {most}], not {sampling.noise_level}")
    if sampling.strength < 1 and "low_res_resolution" not in model.settings:
        raise ValueError(f"{model.name}: strength must be 1: only an upsampler has an image to start from")
    own = getattr(model.sampling, "guidance_scale", 1)  # without effect where there is no null
    if sampling.guidance_scale not in (1, own) and not model.has_null:
        raise ValueError(f"{model.name}: guidance_scale must be 1: this model has no condition that can be left out")
    if sampling.autoguidance_scale != 1 and not has_weaker:
        raise ValueError(f"{model.name}: autoguidance_scale must be 1: this cascade has no weaker model of it")


def image_noise(model: SamplingModel, plans: Sequence[Plan]) -> Callable[..., Tensor]:
    """Draws the next noise (B, C, H, W) of the model's images or latents, see `noise_of`."""
    side = model.settings["resolution"]
    return noise_of(plans, model.name, (model.network.get("in_channels", 3), side, side), model.device)


def denoise(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    noise: Callable[..., Tensor] | None = None,
    sampling: DiffusionSampling | None = None,
    extra: Mapping[str, Tensor] = UNCONDITIONED.condition,
    frozen: Conditions = UNCONDITIONED,
    score: Score | None = None,
    weaker: SamplingModel | None = None,
    known: Known | None = None,
    start: samplers.Start | None = None,
    around: Callable[[Denoise], Denoise] = lambda network: network,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Samples images (B, C, H, W) of plans with equal sampling settings.

    Args:
        noise: draws the next noise (B, C, H, W), x_T first. None: by the plans' seeds.
        sampling: None: the settings of the first plan.
        extra: conditions that are never null.
        frozen: what `frozen_conditions` makes of the plans.
        weaker: takes the place of no condition where the sampling has an autoguidance_scale.
        start: images that are noised in place of noise alone.
        around: what is done to the guided network before it is sampled from.
    Raises ValueError for an unknown sampler, or steps that are out of its range."""
    condition, null = encode_conditions(model, plans)
    objective, sampling = make_objective(model.settings["objective"]), sampling or plans[0].of(model)
    noise = noise or image_noise(model, plans)
    away = weaker if sampling.autoguidance_scale != 1 else None
    network = guidance.guide(
        objective,
        model.module,
        {**condition, **frozen.condition, **extra},
        null | frozen.null,
        sampling.guidance_scale if away is None else sampling.autoguidance_scale,
        weaker=None if away is None else away.module,
        interval=sampling.guidance_interval,
        rescale=sampling.guidance_rescale,
        channels=sampling.guided_channels,
    )
    names = {"sampler", "num_inference_steps", "eta", "spacing", "threshold"}
    return sample(
        around(network),
        objective,
        noise(-1),
        noise=noise,
        score=score,
        known=known,
        start=start,
        on_step=on_step,
        percentile=sampling.threshold_percentile,
        **sampling.model_dump(include=names),
    )


def classifier_score(model: SamplingModel, labels: Tensor, scale: float) -> Score:
    """Scale times the gradient of log p(label | x_t) at x_t (Dhariwal and Nichol, 2021, section 4.1).

    Args:
        model: a classifier of noisy images, trained with the schedule of the model that it guides.
        labels: (B,) int64, class ids of the classifier; its num_classes is the null label, which pulls nowhere.
        scale: 0 is no guidance; 1 samples from the product of both models."""
    objective, num_classes = make_objective(model.settings["objective"]), int(model.network["num_classes"])
    labels = labels.to(model.device)
    each = scale * (labels < num_classes)  # (B,)
    return guidance.classifier_score(objective, model.module, labels.clamp(max=num_classes - 1), each)


def score_of(classifier: SamplingModel | None, plans: Sequence[Plan], scale: float | None = None) -> Score | None:
    """Returns the classifier's pull towards the plans' labels; None for no classifier or a scale of 0.
    `scale`: in place of the classifier's own."""
    if classifier is None:
        return None
    scale = plans[0].of(classifier).guidance_scale if scale is None else scale
    if scale == 0:
        return None
    return classifier_score(classifier, encode_conditions(classifier, plans).condition["label"], scale)


@torch.no_grad()
def class_log_probabilities(model: SamplingModel, images: Tensor) -> Tensor:
    """log p(class | image), (B, K) fp32, of finished images (B, 3, H, W) in [-1, 1]."""
    objective, images = make_objective(model.settings["objective"]), images.to(model.device)
    first = objective.times(torch.zeros(len(images), device=model.device))
    return objective.apply(model.module, images, first).float().log_softmax(dim=1)


def check_guides(classifier: SamplingModel, model: SamplingModel) -> None:
    """Raise ValueError, in one line, unless noise, images or latents, and classes are the model's."""
    if not classifier.settings["noisy"]:
        raise ValueError(f"the classifier of stage {classifier.name} knows clean images only and can't guide")
    _check_same("classifier", classifier, model, PROCESS, ("resolution", "classes", "latent_scale"))


def _check_same(
    kind: str, guide: SamplingModel, model: SamplingModel, objective: Names, settings: Names, network: Names = ()
) -> None:
    own, other = (
        {name: each.settings["objective"].get(name) for name in objective}
        | {name: each.settings.get(name) for name in settings}
        | {name: each.network.get(name) for name in network}
        for each in (guide, model)
    )
    if different := ", ".join(name for name in own if own[name] != other[name]):
        raise ValueError(f"the {kind} of stage {guide.name} can't guide {model.name}: they differ in {different}")


def kept_pixels(plans: Sequence[Plan], side: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) of plans at S = `side` pixels, and where they are kept, (B, 1, S, S) bool.
    A pixel is kept where it shows no hidden one; a plan without an image keeps none."""
    images, kept = torch.zeros(len(plans), 3, side, side), torch.zeros(len(plans), 1, side, side).bool()
    for row, plan in enumerate(plans):
        if plan.given is not None:
            images[row] = downsample(plan.given.known[None], side)
            kept[row] = F.adaptive_max_pool2d(plan.given.mask, side) == 0
    return images, kept


def known_part(model: SamplingModel, plans: Sequence[Plan], decoder: SamplingModel | None = None) -> Known | None:
    """Returns what plans keep of a model's images or latents; None where no plan has an image.
    A latent of `decoder` is kept where no pixel of its patch is hidden (Avrahami et al., 2023, "Blended Latent
    Diffusion", section 4.1). The noise is a function of the seed, and no other random number depends on it."""
    if all(plan.given is None for plan in plans):
        return None
    images, kept = (each.to(model.device) for each in kept_pixels(plans, model.settings["resolution"]))
    if decoder is not None:
        side = decoder.settings["resolution"]
        whole = kept_pixels(plans, side)[0].to(model.device)
        images = in_slices(decoder.module.to_latents, whole, resolution=side) * model.settings["latent_scale"]
    noise = noise_of(plans, f"{model.name}/known", tuple(images.shape[1:]), model.device)
    return Known(images, kept, noise())


def sample_upsampler(
    model: SamplingModel,
    plans: Sequence[Plan],
    low_res: Tensor,
    *,
    frozen: Conditions = UNCONDITIONED,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Enlarge low_res (B, 3, h, w) to (B, 3, H, W).
    The images are rounded to 8 bits first, as those of training, and then noised to a fixed level (noise conditioning
    augmentation; Ho et al., 2022, section 4.2). With a strength below 1 they are also what sampling starts from: the
    highest noise levels would only find again what low_res shows."""
    noise, sampling, learned = image_noise(model, plans), plans[0].of(model), model.settings
    enlarged = upsample(quantize_8_bit(low_res).to(model.device), learned["resolution"])
    chosen = min(NOISE_LEVEL, learned["max_noise_level"]) if sampling.noise_level is None else sampling.noise_level
    level = torch.full((len(plans),), chosen, device=model.device)
    schedule = make_schedule(learned["augmentation_schedule"], num_train_timesteps=learned["augmentation_steps"])
    return denoise(
        model,
        plans,
        noise=noise,
        extra={"low_res": augment_low_res(schedule, enlarged, noise(), level), "noise_level": level},
        frozen=frozen,
        known=known_part(model, plans),
        start=samplers.Start(enlarged, sampling.steps_taken) if sampling.strength < 1 else None,
        on_step=on_step,
    )


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
    """Samples images (B, C, H, W) of plans with equal sampler and steps, by one way of guidance.

    Args:
        scale: of the guidance: 0 is none by a classifier, 1 is none otherwise.
        weaker: takes the place of the model without condition (autoguidance; Karras et al., 2024).
        classifier: of noisy images; its gradient towards each plan's label guides (Dhariwal and Nichol, 2021).
        interval: guide at these noise levels only, sigma / signal (Kynkäänniemi et al., 2024).
        unconditional: with a classifier, the model itself is told no condition."""
    changes: dict[str, Any] = {"guidance_scale": 1.0, "autoguidance_scale": 1.0, "guidance_interval": interval}
    if classifier is None:
        changes["guidance_scale" if weaker is None else "autoguidance_scale"] = scale
    sampling = plans[0].of(model).model_copy(update=changes)
    told = [replace(plan, label=None, prompt=None) for plan in plans] if unconditional else plans
    return denoise(model, told, sampling=sampling, score=score_of(classifier, plans, scale), weaker=weaker)


class Diffusion(Generator):
    """Prompt -> frozen text encoder -> prior -> base -> decoder -> upsamplers.
    The frozen text encoder, the diffusion prior, the autoencoder's decoder and the upsamplers are optional."""

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
            _check_same("model", parts.weaker, self.first, (*PROCESS, "prediction_type"), ("resolution",), SHAPE)

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
        """Names of the base's classes, else of the guiding classifier's."""
        return self.first.classes or ([] if self.parts.classifier is None else self.parts.classifier.classes)

    @property
    def condition_images(self) -> ConditionImages | None:
        settings = self.first.settings
        if not self.first.takes_condition_image:
            return None
        return ConditionImages(settings["resolution"], settings["condition_member"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks on an image; what makes color fills masks."""
        return MASK_TASKS if (self.parts.autoencoder or self.first).network.get("in_channels", 3) == 3 else ()

    def resolve(self, request: Request) -> Plan:
        """Resolves a request; upsamplers enlarge the base's image and take the conditions they know."""
        parts = self.parts
        if request.classifier_scale is not None and parts.classifier is None:
            raise ValueError("classifier_scale needs a cascade with a classifier, which guides its base")
        for reader in (parts.contrastive, parts.text_encoder):
            if request.prompt is not None and reader is not None:
                reader.check(request.prompt)
        for_base = request
        if request.label is not None and not self.first.classes and self.classes:
            class_id(request.label, self.classes)
            for_base = request.replace(label=None)  # only the classifier is conditioned on the label
        given = None
        if request.image is not None or request.mask is not None or request.task is not None:
            given = given_in_mask(parts.autoencoder or self.first, request, size=self.sides[-1])
        check_conditions(self.first, for_base)
        plan = self.plan_of(request, given=given)
        check_sampling(self.first, plan.of(self.first), has_weaker=parts.weaker is not None)
        for upsampler in parts.upsamplers:
            check_sampling(upsampler, plan.of(upsampler))
        if parts.diffusion_prior is not None:
            check_steps(parts.diffusion_prior, plan.of(parts.diffusion_prior))
        return plan

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Makes the images of each stage: first the base's images, then each upsampler's."""
        parts, decoder = self.parts, self.parts.autoencoder
        text = parts.contrastive if parts.diffusion_prior else parts.text_encoder or parts.contrastive

        def frozen(model: SamplingModel) -> Conditions:
            if not model.reads_by_frozen_encoder:
                return UNCONDITIONED
            return frozen_conditions(model, plans, text=text, prior=parts.diffusion_prior, on_step=hooks.each)

        def image(made: Tensor) -> Tensor:
            """Decodes the base's output to images (B, 3, H, W), with the pixels that are kept."""
            if decoder is None:
                return made
            latents, side = made / self.first.settings["latent_scale"], decoder.settings["resolution"]
            images, kept = (each.to(made.device) for each in kept_pixels(plans, side))
            return torch.where(kept, images, in_slices(decoder.module.from_latents, latents, resolution=side))

        base = denoise(
            self.first,
            plans,
            frozen=frozen(self.first),
            score=score_of(parts.classifier, plans),
            weaker=parts.weaker,
            known=known_part(self.first, plans, decoder),
            on_step=hooks.of_stage("base", image),
        )
        images = {"base": image(base)}
        for model in parts.upsamplers:
            low_res, shown = list(images.values())[-1], hooks.of_stage(model.name)
            images[model.name] = sample_upsampler(model, plans, low_res, frozen=frozen(model), on_step=shown)
        return images

    def example(self) -> Request:
        request = super().example().replace(steps=10)
        if self.parts.weaker is None and self.first.has_null:
            request = request.replace(guidance_scale=2.0)
        if self.parts.classifier is not None:
            request = request.replace(label="0", classifier_scale=1.0)
        side = self.condition_images
        return request if side is None else request.replace(condition=gray_png(side.resolution))
