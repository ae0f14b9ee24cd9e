"""A contrastive encoder that chooses among images of a prompt (Ramesh et al., 2021, section 2.6).

Shapes: B plans, H = W sides of images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.models.contrastive import ContrastiveEncoder
from components.models.diffusion.corruption import downsample, quantize_8_bit
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan


def likeness_to_prompts(reranker: SamplingModel, plans: Sequence[Plan]) -> Callable[[Tensor], Tensor]:
    """How near images (B, 3, H, W) in [-1, 1] are to the plans' prompts: cosines (B,), and 0 without a prompt."""
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
