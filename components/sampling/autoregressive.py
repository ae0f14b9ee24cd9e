"""Draw the tokens of images from the prior in raster order.

Order of the filters: temperature, top-k, softmax, top-p. Tokens as likely as the k-th all survive top-k; top-p keeps
the most likely tokens until their mass reaches p, the one that reaches it included, so at least one survives.
Guidance: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6 on logits, with guidance_scale = 1 + w.

Shapes: B images, N num_tokens, L text_length, M condition tokens, K codebook_size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from components.models.token_network import TokenNetwork
from components.models.transformer import Transformer
from components.sampling.compiled_decoding import Step, compiled_steps

OnToken = Callable[[int, int], None]  # (tokens done, all tokens)


def generate(
    transformer: Transformer,
    *,
    generators: Sequence[torch.Generator],
    label: Tensor | None = None,
    text: Tensor | None = None,
    condition: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_token: OnToken | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sample one token sequence for each generator.

    An image's tokens depend on its own generator and conditions, not on the rest of the batch.

    Args:
        transformer: in eval mode.
        generators: one CPU generator an image, B in all; each gives N uniform numbers.
        label: (B,) int64; None stands for the null label.
        text: (B, L) int64, for a model with text.
        condition: (B, M) int64, for a model with a condition image.
        null_text: (L,) int64, the encoding of the empty text; needed when a text is guided.
        guidance_scale: 1 is off; otherwise conditional and null logits are combined, in a batch of 2B.
        temperature: > 0, or 0 for the most likely token each time.
        top_k: keep the k most likely tokens, k >= 1. None: all.
        top_p: keep the most likely tokens of this mass, in (0, 1]. None: all.
        on_token: called with (tokens done, N) after each step.
        compiled: step by `compiled_steps`: the same tokens but for rounding.

    Returns:
        (B, N) int64 in [0, K), on the transformer's device.

    Raises:
        ValueError: when a setting is out of its range, or null_text is missing.
    """
    check_filters(temperature=temperature, top_k=top_k, top_p=top_p)
    device, num_tokens, guided = transformer.device, transformer.num_tokens, guidance_scale != 1.0
    uniforms = torch.stack([torch.rand(num_tokens, generator=g) for g in generators], dim=1).to(device)  # (N, B)
    tokens = torch.empty(num_tokens, len(generators), dtype=torch.int64, device=device)
    conditions = without_none(label=label, text=text, condition=condition)
    if guided:
        conditions = with_null(transformer, conditions, null_text=null_text)
    steps = compiled_steps if compiled else plain_steps
    with torch.inference_mode(), steps(transformer, len(generators) * (1 + guided), conditions) as (logits, step):
        for i in range(num_tokens):
            if i > 0:
                logits = step(tokens[i - 1].repeat(2) if guided else tokens[i - 1])
            tokens[i] = draw(
                guided_logits(logits, guidance_scale),
                uniforms=uniforms[i],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            if on_token is not None:
                on_token(i + 1, num_tokens)
    return tokens.T.contiguous()


def draw(logits: Tensor, *, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Draws a token for each row of `logits` (B, K): (B,) int64.

    By inversion of the distribution at `uniforms` (B,) in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    # fp64, so that u * total < total for every fp32 u < 1 and a token of probability zero can never be drawn.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, K)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def token_probabilities(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Returns the filtered distribution of each row of `logits` (B, K) in fp32.

    The result is (B, K), zero where filtered; rows sum to one.
    """
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


def without_none(**conditions: Tensor | None) -> dict[str, Tensor]:
    """Returns the conditions that are set."""
    return {name: value for name, value in conditions.items() if value is not None}


def with_null(network: TokenNetwork, conditions: dict[str, Tensor], *, null_text: Tensor | None) -> dict[str, Tensor]:
    """Returns the conditions of a batch and an equal number of null conditions: a guided batch of 2B.

    Raises ValueError if a text is among them and null_text, the encoding of the empty text (L,), is not given.
    """
    if "text" in conditions and null_text is None:
        raise ValueError("guidance of a text needs null_text, the encoding of the empty text")
    nulls = {"label": network.null_label, "condition": network.null_condition, "text": null_text}
    doubled = {}
    for name, value in conditions.items():
        null = torch.as_tensor(nulls[name], device=value.device)
        doubled[name] = torch.cat([value, null.expand_as(value)])
    return doubled


def guided_logits(logits: Tensor, guidance_scale: float) -> Tensor:
    """Combine conditional and null logits (2B, …) into (B, …).

    With a guidance_scale of 1 there are no null logits, and the logits (B, …) are returned unchanged.
    """
    if guidance_scale == 1.0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, guidance_scale)


def check_filters(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for a filter setting out of range."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token; None turns the filter off")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]; None turns the filter off")


@contextmanager
def plain_steps(
    transformer: Transformer, batch_size: int, conditions: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Step]]:
    """Yields the first tokens' logits (B, K) and the step for the following tokens, with a new cache."""
    logits, cache = transformer.start(batch_size, **conditions, cache=None)
    yield logits, partial(transformer.step, cache=cache)
