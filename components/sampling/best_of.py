"""Best of several candidates, scored by a contrastive encoder or by the prior.

DALL-E ranks 512 candidates by a contrastive model (Ramesh et al. 2021, 2.6). Without a second network the prior can say
how much the condition explains: log p(tokens | condition) - log p(tokens), the pointwise mutual information.

Shapes: B images, N num_tokens, K codebook_size, H = W sides of images.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from components.models.contrastive import ContrastiveEncoder
from components.models.diffusion.corruption import downsample, quantize_8_bit
from components.models.transformer import Transformer
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan


def best_of(sample: Callable[[int], Tensor], score: Callable[[Tensor], Tensor], *, n: int) -> Tensor:
    """Draw n candidates of each of B images and keep the first one of the highest score.

    Args:
        sample: called with the candidate's number k from 0, gives (B, …): tokens or images. Where candidate k of a
            image is a function of (its seed, k), so is the choice.
        score: (B, …) -> (B,), the higher the better; NaN is never better.
        n: candidates, at least 1; raises ValueError for fewer."""
    if n < 1:
        raise ValueError(f"best of {n} is nothing: n must be at least 1")
    chosen = sample(0)
    best = score(chosen).float().nan_to_num(nan=-torch.inf)  # (B,)
    for k in range(1, n):
        drawn = sample(k)
        scores = score(drawn).float()
        better = scores > best
        best = torch.where(better, scores, best)
        chosen = torch.where(better.to(chosen.device).view(-1, *[1] * (chosen.ndim - 1)), drawn, chosen)
    return chosen


@torch.no_grad()
def mutual_information(
    transformer: Transformer, tokens: Tensor, *, condition: Mapping[str, Tensor], null: Mapping[str, Tensor]
) -> Tensor:
    """log p(tokens | condition) - log p(tokens | null) of each image under the prior, in nats.

    Args:
        transformer: in eval mode, trained with dropped conditions.
        tokens: (B, N) int64 in [0, K).
        condition, null: arguments of the transformer by name, each (B, …), with the same names.
    Returns (B,) fp32."""
    doubled = tokens.repeat(2, 1)
    logits = transformer(
        doubled, **{name: torch.cat([condition[name], null[name]]) for name in condition}
    )  # (2B, N, K)
    log_p = logits.float().log_softmax(dim=-1).gather(-1, doubled[..., None])[..., 0].sum(dim=1)
    return log_p[: len(tokens)] - log_p[len(tokens) :]


def likeness_to_prompts(reranker: SamplingModel, plans: Sequence[Plan]) -> Callable[[Tensor], Tensor]:
    """Cosines (B,) between images (B, 3, H, W) in [-1, 1] and the plans' prompts.
    The cosine is 0 for a plan without a prompt."""
    encoder, text, side = reranker.module, reranker.text, reranker.settings["resolution"]
    assert isinstance(encoder, ContrastiveEncoder)
    assert text is not None  # a bundle of this kind has its tokenizer
    wanted = encoder.encode_text(text.encode([plan.prompt or "" for plan in plans]).to(reranker.device))
    asked = torch.tensor([plan.prompt is not None for plan in plans], device=reranker.device)

    def score(image: Tensor) -> Tensor:
        finished = quantize_8_bit(image.to(reranker.device))  # as it is handed out
        seen = quantize_8_bit(downsample(finished, side))  # as the encoder was trained on images
        return (encoder.encode_image(seen) * wanted.embedding).sum(dim=1) * asked

    return score
