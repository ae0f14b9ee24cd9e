"""What recipes of diffusion models have in common: facts that several of their stages share, checked."""

from collections.abc import Sequence

from components.configuration.diffusion import DiffusionTraining
from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import CascadeSampling, DiffusionBranchSampling, DiffusionSampling


def check_cascade(
    base: DiffusionTraining,
    upsamplers: Sequence[DiffusionTraining],
    sampling: CascadeSampling | DiffusionBranchSampling,
    *,
    made: int | None = None,
) -> int:
    """The resolution that the last stage makes.

    Args:
        made: of the base's images; None: as its data.

    Raises ValueError, naming the field, for a stage that does not fit the one before it, or samples as it can't.
    """
    if base.low_res is not None or base.degradation is not None:
        raise ValueError("base.low_res and base.degradation must be empty: the base model starts from noise alone")
    check_steps("sampling.base", sampling.base, base)
    if len(sampling.upsamplers) != len(upsamplers):
        raise ValueError(f"sampling.upsamplers must be as many as upsamplers, {len(upsamplers)}")
    made = base.data.resolution if made is None else made
    for number, (upsampler, own) in enumerate(zip(upsamplers, sampling.upsamplers, strict=True)):
        low_res = upsampler.low_res
        if low_res is None or low_res.low_res_resolution != made:
            raise ValueError(f"upsamplers.{number}.low_res_resolution must be {made}, what the stage before it makes")
        check_steps(f"sampling.upsamplers.{number}", own, upsampler)
        if own.noise_level is not None and own.noise_level > low_res.max_noise_level:
            raise ValueError(f"sampling.upsamplers.{number}.noise_level must be at most {low_res.max_noise_level}")
        made = upsampler.data.resolution
    return made


def check_channels(base: DiffusionTraining, upsamplers: Sequence[DiffusionTraining] = ()) -> None:
    """Raise ValueError, naming the field, for a base of images, not latents, with other channels than images have."""
    channels = base.data.in_channels
    if channels not in (1, 3):
        raise ValueError(
            f"base.data.in_channels must be 3, or 1 for gray images, not {channels}: others are of latents"
        )
    if channels == 1 and upsamplers:
        raise ValueError("base.data.in_channels must be 3: upsamplers enlarge images in color")


def check_weaker(weaker: DiffusionTraining, base: DiffusionTraining) -> None:
    """Raise ValueError, naming the field, for a weaker model of other images, conditions or outputs than the base."""
    pairs = {
        "weaker.resolution": (weaker.data.resolution, "base.resolution", base.data.resolution),
        "weaker.in_channels": (weaker.data.in_channels, "base.in_channels", base.data.in_channels),
        "weaker.conditions": (
            [*weaker.conditioning.conditions],
            "base.conditions",
            [*base.conditioning.conditions],
        ),
        "weaker.process": (weaker.process, "base.process", base.process),
    }
    for name, (found, other, wanted) in pairs.items():
        if found != wanted:
            raise ValueError(f"{name} must be {other} {wanted}")


def check_steps(where: str, sampling: DiffusionSampling, model: DiffusionTraining) -> None:
    """Raise ValueError, naming the field, for steps or a spacing that the model lacks."""
    process = model.process
    if not isinstance(process, DiscreteProcess):
        return
    if sampling.num_inference_steps > process.num_train_timesteps:
        most = process.num_train_timesteps
        raise ValueError(f"{where}.num_inference_steps must be at most num_train_timesteps {most}")
    if process.zero_terminal_snr and sampling.spacing == "leading":
        raise ValueError(f"{where}.spacing must not be leading: it skips the last step of zero_terminal_snr")
