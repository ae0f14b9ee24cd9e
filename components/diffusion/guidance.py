"""Classifier-free guidance (Ho and Salimans, 2022) for any dictionary of conditions."""

from collections.abc import Callable

import torch
from torch import Tensor

from components.diffusion.samplers import Denoise


def guide(
    model: Callable[..., Tensor],
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    guidance_scale: float | Tensor,
) -> Denoise:
    """Bind conditions and guidance to a network: unconditional + scale * (conditional - unconditional).

    Args:
        model: called as model(x_t, timesteps, **condition) -> (B, C, H, W).
        condition: each value (B, ...).
        null: the same keys as condition for what is guided, each (B, ...); a key that is missing here, such as
            low_res, keeps its value in both halves.
        guidance_scale: a number or one for each sample (B,); 1 is no guidance, and when all are 1 the network runs
            once a step instead of on a doubled batch. Papers that write (1 + w) mean guidance_scale = 1 + w.

    Raises:
        ValueError: null has a key that condition lacks.
    """
    if not null.keys() <= condition.keys():
        raise ValueError(f"null conditions without a condition: {', '.join(sorted(null.keys() - condition.keys()))}")
    scale = torch.as_tensor(guidance_scale, dtype=torch.float32)
    if bool((scale == 1).all()) or not null:
        return lambda x_t, timesteps: model(x_t, timesteps, **condition)
    doubled = {name: torch.cat([value, null.get(name, value)]) for name, value in condition.items()}

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        prediction = model(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), **doubled)
        conditional, unconditional = prediction.chunk(2)
        extra = (scale - 1).reshape(-1, 1, 1, 1).to(prediction)
        # The same formula, written so that a sample whose scale is 1 gets its conditional prediction exactly.
        return conditional + extra * (conditional - unconditional)

    return denoise
