"""A contrastive encoder that chooses among images of a prompt (Ramesh et al., 2021, section 2.6).

Shapes: B requests, H = W sides of images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.models.contrastive import ContrastiveEncoder
from components.models.diffusion.corruption import downsample, quantize_8_bit
from components.sampling.model import SamplingModel
from components.sampling.requests import Request


def likeness_to_prompts(reranker: SamplingModel, requests: Sequence[Request]) -> Callable[[Tensor], Tensor]:
    """How near images (B, 3, H, W) in [-1, 1] are to the requests' prompts: cosines (B,), and 0 without a prompt."""
    encoder, text, side = reranker.module, reranker.text, reranker.settings["resolution"]
    assert isinstance(encoder, ContrastiveEncoder)
    assert text is not None  # a bundle of this kind has its tokenizer
    wanted = encoder.encode_text(text.encode([request.prompt or "" for request in requests]).to(reranker.device))
    asked = torch.tensor([request.prompt is not None for request in requests], device=reranker.device)

    def score(image: Tensor) -> Tensor:
        finished = quantize_8_bit(image.to(reranker.device))  # as it is handed out
        seen = quantize_8_bit(downsample(finished, side))  # as the encoder was trained on images
        return (encoder.encode_image(seen) * wanted.embedding).sum(dim=1) * asked

    return score
