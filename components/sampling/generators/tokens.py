"""The token branch's first half: from requests to the tokens of images, by whatever prior there is.

Shapes: B plans, h w the grid of tokens, N = h * w, M tokens of a condition image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from components.models.diffusion.corruption import downsample, quantize_8_bit
from components.models.token_network import TokenNetwork
from components.models.transformer import MaskedTransformer, Transformer
from components.sampling.autoregressive import PixelNetwork, generate, generate_grid
from components.sampling.generator import ConditionImages, Generator, Hooks, Parts
from components.sampling.image_files import gray_png
from components.sampling.maskgit import maskgit
from components.sampling.model import SamplingModel, in_slices
from components.sampling.plan import (
    Conditions,
    Plan,
    best_of,
    check_conditions,
    condition_images,
    encode_conditions,
    random_stream,
    sampling_of,
)
from components.sampling.requests import Request


def check_prior(model: SamplingModel, request: Request, *, reranked: bool = False) -> None:
    """Raise ValueError, in one line, if the prior can't draw the tokens of a request.
    `reranked`: another network than the prior chooses the best of several."""
    check_conditions(model, request)
    if (request.best_of or 1) > 1 and not isinstance(model.module, Transformer) and not reranked:
        raise ValueError(f"best of {request.best_of} needs a causal transformer, which knows how likely its tokens are")
    if isinstance(model.module, MaskedTransformer):
        sampling, most = sampling_of(model, request, first=True), model.module.num_tokens
        if sampling.num_inference_steps > most:
            raise ValueError(f"steps must be in [1, {most}], not {sampling.num_inference_steps}")
    elif request.steps is not None:
        raise ValueError("this prior takes no steps: it samples each token once")


def sample_prior(
    model: SamplingModel,
    plans: Sequence[Plan],
    condition: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    candidate: int = 0,
    on_step: Callable[..., None] | None = None,
) -> Tensor:
    """Samples tokens (B, h, w) of plans with equal sampling settings.

    Args:
        condition: (B, M) int64, tokens of a condition image for each plan, for a prior that was trained with one.
        grid: (h, w), where it is to be larger than the trained one; causal transformers only, see `Tokens.grid`.
        candidate: which of the images of a plan's seed, see `best_of`; 0 is the one it gives without candidates.
        on_step: called after each token, or step of a masked prior.
    Raises ValueError, in one line, for a condition or a grid that does not fit the prior."""
    stage = model.name if candidate == 0 else f"{model.name}/{candidate}"
    network, own, sampling = model.module, tuple(model.settings["grid"]), plans[0].of(model)
    height, width = grid = grid or own
    conditions = prior_conditions(model, plans, condition, larger=grid != own)
    generators = [random_stream(plan.seed, stage) for plan in plans]
    settings: dict[str, Any] = {"generators": generators, "sampling": sampling}
    if isinstance(network, PixelNetwork):
        return generate_grid(network, conditions, height=height, width=width, **settings, on_token=on_step)[:, 0]
    if isinstance(network, MaskedTransformer):
        tokens = maskgit(network, conditions, **settings, on_step=on_step)
    else:
        settings["compiled"] = sampling.compile_decoding and model.device.type != "cpu"
        settings["grid"] = None if grid == own else grid
        tokens = generate(network, conditions, **settings, on_token=on_step)
    return rearrange(tokens, "b (h w) -> b h w", h=height, w=width)


def sample_best(
    model: SamplingModel,
    plans: Sequence[Plan],
    condition: Tensor | None = None,
    *,
    n: int,
    on_step: Callable[..., None] | None = None,
) -> Tensor:
    """Samples n candidates and keeps the tokens (B, h, w) that by the prior explain the conditions best.
    `model`: a causal transformer, see `check_prior`. Raises ValueError as `sample_prior`."""
    given, null = prior_conditions(model, plans, condition)
    draw = partial(sample_prior, model, plans, condition, on_step=on_step)
    return best_of(
        lambda number: draw(candidate=number),
        lambda tokens: mutual_information(model.module, tokens.flatten(1), condition=given, null=null),
        n=n,
    )


def prior_conditions(
    model: SamplingModel, plans: Sequence[Plan], condition: Tensor | None = None, *, larger: bool = False
) -> Conditions:
    """Returns the plans' conditions for the prior, the tokens (B, M) of a condition image among them.
    `larger`: it may be of a larger image. Raises ValueError for one that does not fit the prior."""
    conditions, network = encode_conditions(model, plans), model.module
    length = network.condition_length if isinstance(network, TokenNetwork) else 0
    if condition is None and length == 0:
        return conditions
    if condition is None:
        raise ValueError(f"the model of stage {model.name} needs a condition image of {length} tokens")
    if length == 0:
        raise ValueError(f"the model of stage {model.name} takes no condition image: it was trained without")
    if condition.shape != (len(plans), length) and not larger:
        raise ValueError(f"condition tokens of {tuple(condition.shape)} where {(len(plans), length)} are needed")
    if not 0 <= int(condition.min()) <= int(condition.max()) < network.null_condition:
        raise ValueError(f"condition tokens must be in [0, {network.null_condition - 1}]")
    condition = condition.to(model.device)
    null = torch.full_like(condition, network.null_condition)
    return Conditions(conditions.condition | {"condition": condition}, conditions.null | {"condition": null})


@torch.no_grad()
def mutual_information(
    transformer: Transformer, tokens: Tensor, *, condition: Mapping[str, Tensor], null: Mapping[str, Tensor]
) -> Tensor:
    """log p(tokens | condition) - log p(tokens | null) of each image under the prior in nats, (B,) fp32.
    This pointwise mutual information tells, without a second network, how much the condition explains. `tokens`: (B, N)
    int64 in [0, K). `condition`, `null`: arguments of the transformer by the same names, each (B, …)."""
    doubled = tokens.repeat(2, 1)
    both = {name: torch.cat([condition[name], null[name]]) for name in condition}
    logits = transformer(doubled, **both)  # (2B, N, K)
    log_p = logits.float().log_softmax(dim=-1).gather(-1, doubled[..., None])[..., 0].sum(dim=1)
    return log_p[: len(tokens)] - log_p[len(tokens) :]


def likeness_to_prompts(reranker: SamplingModel, plans: Sequence[Plan]) -> Callable[[Tensor], Tensor]:
    """Cosines (B,) between images (B, 3, H, W) in [-1, 1] and the plans' prompts; 0 without a prompt."""
    encoder, text, side = reranker.module, reranker.text, reranker.settings["resolution"]
    assert text is not None  # a bundle of this kind has its tokenizer
    wanted = encoder.encode_text(text.encode([plan.prompt or "" for plan in plans]).to(reranker.device))
    asked = torch.tensor([plan.prompt is not None for plan in plans], device=reranker.device)

    def score(image: Tensor) -> Tensor:
        finished = quantize_8_bit(image.to(reranker.device))  # as it is handed out
        seen = quantize_8_bit(downsample(finished, side))  # as the encoder was trained on images
        return (encoder.encode_image(seen) * wanted.embedding).sum(dim=1) * asked

    return score


class Tokens(Generator):
    """(Tokens of a condition image ->) prior -> tokenizer's decoder."""

    name, title = "tokens", "Tokens"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        return parts.prior if parts.tokenizer is not None else None

    @property
    def condition_images(self) -> ConditionImages | None:
        seen = self.parts.condition
        if seen is None:
            return None
        return ConditionImages(seen.settings["resolution"], seen.settings["member"], seen.module.map_classes)

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        assert parts.tokenizer is not None
        self.tokenizer = parts.tokenizer
        made = self.tokenizer.settings["resolution"]
        if parts.reranker is not None and parts.reranker.settings["resolution"] > made:
            raise ValueError(f"the reranker sees {parts.reranker.settings['resolution']}² images, {made}² are made")

    def resolve(self, request: Request) -> Plan:
        reranker = self.parts.reranker
        check_prior(self.first, request, reranked=reranker is not None)
        if reranker is not None and request.prompt is None and (request.best_of or 1) > 1:
            raise ValueError("best_of needs a prompt: the reranker of this cascade compares images with it")
        if reranker is not None and reranker.text is not None and request.prompt is not None:
            reranker.text.check(request.prompt)
        plan = self.plan_of(request)
        candidates = request.best_of or 1
        if reranker is not None and request.size is None and request.prompt is not None:
            candidates = plan.of(reranker).candidates
        return replace(plan, candidates=candidates, grid=self.grid(request.size), size=request.size)

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Makes the images of plans; of several candidates the best by the reranker, or by the prior."""
        tokenizer, seen, condition = self.tokenizer, self.parts.condition, None
        if seen is not None:
            own = self.first.settings["grid"]  # a larger image needs as much more of its condition
            sides = [seen.settings["resolution"] * n // of for n, of in zip(plans[0].grid or own, own, strict=True)]
            shown = condition_images(plans, *sides, nearest=seen.module.map_classes > 0)  # classes have no mean
            condition = seen.module.tokenize(shown.to(seen.device)).flatten(1)
        candidates, side, reranker = plans[0].candidates, max(plans[0].size or self.size), self.parts.reranker

        def image(tokens: Tensor) -> Tensor:
            return in_slices(tokenizer.module.detokenize, tokens.to(tokenizer.device), resolution=side)

        draw = partial(sample_prior, self.first, plans, condition, on_step=hooks.each)
        if candidates == 1:
            return {"tokenizer": image(draw(grid=plans[0].grid))}
        if reranker is None:
            return {"tokenizer": image(sample_best(self.first, plans, condition, n=candidates, on_step=hooks.each))}
        likeness = likeness_to_prompts(reranker, plans)
        return {"tokenizer": best_of(lambda k: image(draw(candidate=k)), likeness, n=candidates)}

    @property
    def models(self) -> tuple[SamplingModel, ...]:
        return tuple(each for each in (self.first, self.parts.reranker) if each is not None)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.first.settings["grid"]
        factor = self.tokenizer.settings["resolution"] // height
        return height * factor, width * factor

    def grid(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """The grid of tokens for an image size; None: the model's own. Raises ValueError for other sizes."""
        if size is None:
            return None
        smallest, (height, _) = self.size, self.first.settings["grid"]
        factor = smallest[0] // height
        if any(side % factor for side in size) or any(side < least for side, least in zip(size, smallest, strict=True)):
            least, asked = ("{1}x{0}".format(*each) for each in (smallest, size))
            raise ValueError(f"size must be multiples of {factor} of at least {least}, not {asked}")
        prior = self.first.module
        if not isinstance(prior, Transformer):
            raise ValueError("this prior makes no larger images: only a causal transformer does")
        if prior.grid != tuple(self.first.settings["grid"]):  # it was told of a row of tokens
            raise ValueError("this prior makes no larger images: it knows no rows and columns")
        return size[0] // factor, size[1] // factor

    def example(self) -> Request:
        seen, request = self.condition_images, super().example()
        return request if seen is None else request.replace(condition=gray_png(seen.resolution))
