"""Numbers that change with the step: what the relaxed and the Gaussian bottleneck are trained under."""

import math

from components.training.config import AutoencoderConfig


def kl_weight_at(config: AutoencoderConfig, step: int) -> float:
    """Weight of the KL divergence in step `step` (1-based): 0 to kl_weight (Ramesh et al., 2021, appendix A.2)."""
    return along_cosine(0.0, config.kl_weight, step=step, num_steps=config.kl_warmup_steps)


def temperature_at(config: AutoencoderConfig, step: int) -> float:
    """Temperature of the relaxation in step `step` (1-based): 1 to final_temperature (the same appendix)."""
    return along_cosine(1.0, config.final_temperature, step=step, num_steps=config.temperature_steps)


def along_cosine(start: float, end: float, *, step: int, num_steps: int) -> float:
    """From `start` at step 0 to `end` at step `num_steps`, half a cosine, and `end` from then on."""
    if step >= num_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2
