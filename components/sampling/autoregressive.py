"""Draw the tokens of pictures from the prior, one after another.

Order of the filters: temperature, top-k, softmax, top-p. Tokens as likely as the k-th all survive top-k; top-p keeps
the most likely tokens until their mass reaches p, the one that reaches it included, so at least one survives.
Guidance: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6 on logits, with guidance_scale = 1 + w.

Shapes: B pictures, N num_tokens, L text_length, K codebook_size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.models.transformer import KVCache, Transformer


def generate(
    transformer: Transformer,
    *,
    generators: Sequence[torch.Generator],
    label: Tensor | None = None,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample one token sequence for each generator.

    A picture's tokens depend on its own generator and condition, not on the rest of the batch.

    Args:
        transformer: in eval mode.
        generators: one CPU generator a picture, B in all; each gives N uniform numbers.
        label: (B,) int64; None stands for the null label.
        text: (B, L) int64, for a model with text.
        null_text: (L,) int64, the encoding of the empty text; needed when a text is guided.
        guidance_scale: 1 is off; otherwise conditional and null logits are combined, in a batch of 2B.
        temperature: > 0, or 0 for the most likely token each time.
        top_k: keep the k most likely tokens, k >= 1. None: all.
        top_p: keep the most likely tokens of this mass, in (0, 1]. None: all.
        on_token: called with (tokens done, N) after each step.

    Returns:
        (B, N) int64 in [0, K), on the transformer's device.

    Raises:
        ValueError: when a setting is out of its range, or null_text is missing.
    """
    _check(temperature=temperature, top_k=top_k, top_p=top_p)
    device, num_tokens = transformer.position.device, transformer.num_tokens
    uniforms = torch.stack([torch.rand(num_tokens, generator=g) for g in generators], dim=1).to(device)  # (N, B)
    tokens = torch.empty(num_tokens, len(generators), dtype=torch.int64, device=device)
    guided = guidance_scale != 1.0
    with torch.inference_mode():
        logits, cache = _start(
            transformer, batch_size=len(generators), label=label, text=text, null_text=null_text, guided=guided
        )
        for i in range(num_tokens):
            if i > 0:
                logits = _step(transformer, tokens[i - 1], cache=cache, guided=guided)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = torch.lerp(unconditional, conditional, guidance_scale)
            tokens[i] = draw(logits, uniforms=uniforms[i], temperature=temperature, top_k=top_k, top_p=top_p)
            if on_token is not None:
                on_token(i + 1, num_tokens)
    return tokens.T.contiguous()


def draw(logits: Tensor, *, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token (B,) for each row of `logits` (B, K), by inversion of the distribution at `uniforms` (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    # fp64, so that u * total < total for every fp32 u < 1 and a token of probability zero can never be drawn.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, K)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def token_probabilities(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Filtered distribution of each row of `logits` (B, K): (B, K) fp32, zero where filtered; rows sum to one."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the tokens that come first
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered / ordered.sum(dim=-1, keepdim=True))
    return probabilities


def _start(
    transformer: Transformer,
    *,
    batch_size: int,
    label: Tensor | None,
    text: Tensor | None,
    null_text: Tensor | None,
    guided: bool,
) -> tuple[Tensor, KVCache]:
    """Logits and cache after the condition; guided, the second half of the batch has the null condition."""
    if not guided:
        return transformer.start(batch_size, label=label, text=text)
    if label is not None:
        label = torch.cat([label, torch.full_like(label, transformer.null_label)])
    if text is not None:
        if null_text is None:
            raise ValueError("guidance of a text needs null_text, the encoding of the empty text")
        text = torch.cat([text, null_text.expand_as(text)])
    return transformer.start(2 * batch_size, label=label, text=text)


def _step(transformer: Transformer, tokens: Tensor, *, cache: KVCache, guided: bool) -> Tensor:
    return transformer.step(tokens.repeat(2) if guided else tokens, cache=cache)


def _check(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token; None turns the filter off")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]; None turns the filter off")
