"""Draw the tokens of images from a masked transformer, many at a time (MaskGIT).

Source: Chang et al. 2022, section 3.2. All tokens are masked at first. Each step draws a token for every masked place
and keeps those that the network is surest of; how many stay masked follows a cosine. Confidence is log p of the token
drawn plus Gumbel noise that fades.

Shapes: B images, N num_tokens, K codebook_size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.configuration.sampling import MaskedTokenSampling
from components.models.transformer import MaskedTransformer
from components.sampling.autoregressive import draw, guided_logits
from components.sampling.plan import UNCONDITIONED, Conditions

DEFAULTS = MaskedTokenSampling()


def maskgit(
    transformer: MaskedTransformer,
    conditions: Conditions = UNCONDITIONED,
    *,
    generators: Sequence[torch.Generator],
    sampling: MaskedTokenSampling = DEFAULTS,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample a token sequence (B, N) int64 in [0, K) for each generator, on the transformer's device.

    Args:
        transformer: in eval mode.
        generators: one CPU generator an image, B in all; each gives 2 N uniform numbers a step.
        sampling: with N steps one token is kept at a time; choice_temperature is of the Gumbel noise on the confidence
            before the first step, the last step has none.
        on_step: called with (step from 0, tokens (B, N)) after each step; K stands where a token is still masked."""
    steps, scale = sampling.num_inference_steps, sampling.guidance_scale
    counts, given = masked_counts(transformer.num_tokens, steps=steps), conditions.guided(scale)
    device, mask_token = transformer.device, transformer.mask_token
    tokens = torch.full((len(generators), transformer.num_tokens), mask_token, device=device)
    with torch.inference_mode():
        for step, left in enumerate(counts):
            noise = torch.stack([torch.rand(2, transformer.num_tokens, generator=g) for g in generators]).to(device)
            logits = guided_logits(transformer(tokens.repeat(1 if scale == 1 else 2, 1), **given), scale)  # (B, N, K)
            uniforms = noise[:, 0].flatten()
            drawn = draw(logits.flatten(0, 1), uniforms=uniforms, sampling=sampling).view_as(tokens)
            spread = sampling.choice_temperature * (1 - (step + 1) / steps)
            log_p = logits.float().log_softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
            confidence = log_p + spread * gumbel(noise[:, 1])
            tokens = keep_surest(tokens, drawn, confidence=confidence, left=left, mask_token=mask_token)
            if on_step is not None:
                on_step(step, tokens)
    return tokens.clone()


def masked_counts(num_tokens: int, *, steps: int) -> list[int]:
    """Returns the number of masked tokens after each step, the last being 0.
    The number is ⌊N cos(π/2 · t)⌋, t the share of steps done, or one less than before where a step would keep no token.
    `steps`: in [1, N], see `check_prior`."""
    counts = [num_tokens]
    for step in range(1, steps + 1):
        counts.append(min(math.floor(num_tokens * math.cos(math.pi / 2 * (step / steps))), counts[-1] - 1))
    return counts[1:]


def keep_surest(tokens: Tensor, drawn: Tensor, *, confidence: Tensor, left: int, mask_token: int) -> Tensor:
    """Fill masked places of `tokens` (B, N) from `drawn` (B, N), except the `left` least confident.
    What is known stays as it is. Every row has the same number of masked places."""
    masked = tokens == mask_token
    confidence = confidence.masked_fill(~masked, -torch.inf)
    places = confidence.topk(int(masked[0].sum()) - left, dim=1).indices  # (B, how many are kept now)
    return tokens.scatter(1, places, drawn.gather(1, places))


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), finite at 0 too."""
    return -torch.log(-torch.log(uniforms.clamp(min=torch.finfo(uniforms.dtype).tiny)))
