"""Training of autoregressive and masked models of tokens or pixels.

Priors: next-token prediction over images' tokens (Esser et al., 2021, section 3.2), with a text_loss_weight over those
of texts too (Ramesh et al., 2021, section 2.2); or masked tokens from visible tokens: MaskGIT (Chang et al., 2022,
section 3.1). Pixels: gated PixelCNN and Row LSTM (van den Oord et al., 2016), of an image's exact likelihood; values
are 8-bit RGB or gray (dimensions of 256 values), or grids of tokens.

Shapes: B batch, C colors, H W height and width, K num_values, N tokens an image, L text length, M condition tokens."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from components.configuration.conditions import TokenGrid
from components.configuration.sampling import MaskedTokenSampling
from components.configuration.trainings import MaskedPriorTraining, PixelTraining, PriorTraining
from components.models.devices import to_device
from components.models.diffusion.corruption import from_levels, to_levels
from components.models.losses.cross_entropy import masked_token_loss, text_loss, text_nats, token_loss
from components.models.transformer import JointLogits, MaskedTransformer
from components.sampling.autoregressive import generate, generate_grid
from components.sampling.images import one_channel
from components.sampling.maskgit import DEFAULTS, maskgit
from components.sampling.plan import Conditions
from components.training.learner import LearnerTask
from components.training.loop import Arrays, Batch, Metrics
from components.training.randomness import Draws, derive_seed

EVALUATION_DRAWS = 4  # masks for each held-out image


class TokenTask(LearnerTask):
    """Previews of tokens: samples under held-out conditions, decoded; none without a tokenizer."""

    grid: TokenGrid
    sampled: Callable[..., Tensor]  # tokens (B, N) of a network, by conditions and `generators`

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        if self.load_tokenizer is None:
            return
        tokenizer, network = self.load_tokenizer().to(self.worker.device), self.learner.snapshot()
        for part in parts:
            generators = preview_generators(self.seed, part["position"])
            tokens = self.sampled(network, Conditions(self.conditions(part), {}), generators=generators)
            yield [tokenizer.detokenize(rearrange(tokens, "b (h w) -> b h w", h=self.grid.height))]


class PriorTask(TokenTask):
    """Trains a transformer to predict the tokens of images under conditions."""

    config: PriorTraining
    sampled = staticmethod(generate)

    def part_losses(self, part: Batch) -> Metrics:
        """Mean negative log likelihoods of tokens and, with a text_loss_weight, of texts that are not dropped.
        Tokens are corrupted and conditions dropped by the recipe."""
        conditions, text_weight = self.dropped(part), self.config.text_loss_weight
        with self.learner.autocast():
            logits = self.learner.forward(self.corrupted(part), **conditions, **self.wanted_logits)
            if not isinstance(logits, JointLogits):
                loss = token_loss(logits, tokens=part["tokens"])  # () nats a token
                return {"loss": loss, "bits_per_token": loss / math.log(2)}
            tokens = token_loss(logits.tokens, tokens=part["tokens"])
            text = text_loss(logits.text, text=learned_text(conditions["text"], original=part["text"]))
        loss = (1 - text_weight) * tokens + text_weight * text
        return {"loss": loss, "bits_per_token": tokens / math.log(2), "text_bits_per_token": text / math.log(2)}

    @property
    def wanted_logits(self) -> dict[str, bool]:
        return {"with_text": True} if self.config.text_loss_weight > 0 else {}

    def corrupted(self, batch: Batch) -> Tensor:
        """Tokens (B, N), each replaced at random with probability token_corruption, like taming's pkeep."""
        config, tokens, position = self.config, batch["tokens"], batch["position"]
        if config.token_corruption == 0:
            return tokens
        replaced, other = self.draw.uniforms(position, "corruption", [2, tokens.shape[1]]).unbind(1)
        random = (other.double() * self.grid.codebook_size).long()  # (B, N) in [0, K)
        return torch.where(replaced < config.token_corruption, random, tokens)

    def measures(self, network: nn.Module, part: Batch) -> Metrics:
        """Bits/token; with texts also their nats and tokens a sample, for a quotient of both means."""
        logits = network(part["tokens"], **self.conditions(part), **self.wanted_logits)
        measured = {}
        if isinstance(logits, JointLogits):
            nats, count = text_nats(logits.text, text=part["text"])
            measured, logits = {"nats": nats.mean(), "words": count.double().mean()}, logits.tokens
        return measured | {"held_out_bits_per_token": token_loss(logits, tokens=part["tokens"]) / math.log(2)}

    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Bits/token of the averaged weights on held-out images with all conditions, and of their texts."""
        measured = super().evaluate(held_out)
        nats, words = measured.pop("nats", 0.0), measured.pop("words", 0.0)
        return measured | ({"held_out_text_bits_per_token": nats / words / math.log(2)} if words else {})

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples; none where weights are in shards: every single token would gather all of them."""
        return {} if self.worker.shards else super().preview(held_out, step)


def learned_text(text: Tensor, *, original: Tensor) -> Tensor:
    """Texts (B, L) to learn from, with pads (0) in place of dropped texts."""
    return original * (text == original).all(dim=1, keepdim=True)


def preview_generators(seed: int, position: Tensor) -> list[torch.Generator]:
    """A generator for each of the positions (B,), with equal random numbers at each preview."""
    return [torch.Generator().manual_seed(derive_seed(seed, "preview", place)) for place in position.tolist()]


class MaskedPriorTask(TokenTask):
    """Trains a transformer to predict masked tokens, under the images' conditions."""

    config: MaskedPriorTraining

    @property
    def num_tokens(self) -> int:
        return self.grid.height * self.grid.width

    def part_losses(self, part: Batch) -> Metrics:
        masked, smoothing = training_masks(self.draw, part["position"], self.num_tokens), self.config.label_smoothing
        network, conditions = self.learner.forward, self.dropped(part)
        with self.learner.autocast():
            return {"loss": self.loss(network, part, conditions, masked=masked, smoothing=smoothing)}

    def loss(
        self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor], *, masked: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy in nats a masked token, ()."""
        inputs = batch["tokens"].masked_fill(masked, self.grid.codebook_size)  # the mask token
        logits = network(inputs, **conditions)
        return masked_token_loss(logits, tokens=batch["tokens"], masked=masked, label_smoothing=smoothing)

    def measures(self, network: nn.Module, part: Batch) -> Metrics:
        """Upper bound of the bits/token, for tokens drawn one by one in random order."""
        losses = []
        for number in range(EVALUATION_DRAWS):
            masked = evaluation_masks(self.draw, part["position"], self.num_tokens, number=number)
            losses.append(self.loss(network, part, self.conditions(part), masked=masked))
        return {"held_out_bits_per_token_bound": torch.stack(losses).mean() / math.log(2)}

    def sampled(self, network: MaskedTransformer, conditions: Conditions, **how: Any) -> Tensor:
        steps = min(DEFAULTS.num_inference_steps, self.num_tokens)
        return maskgit(network, conditions, sampling=MaskedTokenSampling(num_inference_steps=steps), **how)


def training_masks(draw: Draws, position: Tensor, num_tokens: int) -> Tensor:
    """Masked tokens of each sample, (B, N) bool: ⌈N cos(π/2 · r)⌉ at random places, r ~ U(0, 1).
    Number and places depend on (seed, position) alone."""
    ratio = torch.cos(math.pi / 2 * Draws(draw.seed).uniform(position, "mask_ratio").double())
    counts = to_device((ratio * num_tokens).ceil().long(), draw.device)
    return random_masks(draw, position, counts, num_tokens=num_tokens, stream="mask")


def evaluation_masks(draw: Draws, position: Tensor, num_tokens: int, *, number: int) -> Tensor:
    """Like `training_masks`, with numbers drawn uniformly from 1..N, for the bound on the likelihood."""
    stream = f"evaluation_{number}"
    counts = 1 + draw.integers(position, f"{stream}_count", high=num_tokens)
    return random_masks(draw, position, counts, num_tokens=num_tokens, stream=stream)


def random_masks(draw: Draws, position: Tensor, counts: Tensor, *, num_tokens: int, stream: str) -> Tensor:
    """Masks (B, N) with `counts` (B,) tokens in each row, every set of places equally likely."""
    places = draw.uniforms(position, stream, [num_tokens]).argsort(dim=1, stable=True)
    ranks = places.argsort(dim=1)  # (B, N), a random permutation of 0..N-1
    return ranks < counts[:, None]


class PixelTask(LearnerTask):
    """Trains a network to predict each value of an image from earlier values, under a class or nothing.
    Values are the tokens of a `grid`, or the pixels where there is none."""

    config: PixelTraining
    evaluation_batch = 16  # the logits of 32² RGB images take 3 MB each

    @property
    def bits_name(self) -> str:
        return "bits_per_dim" if self.grid is None else "bits_per_token"

    def part_losses(self, part: Batch) -> Metrics:
        with self.learner.autocast():
            loss = self.loss(self.learner.forward, part, self.dropped(part))
        return {"loss": loss, self.bits_name: loss / math.log(2)}

    def measures(self, network: nn.Module, part: Batch) -> Metrics:
        return {f"held_out_{self.bits_name}": self.loss(network, part, self.conditions(part)) / math.log(2)}

    def loss(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """Mean negative log likelihood in nats a value, ()."""
        values = self.values(batch)
        logits = network(values, **conditions)  # (B, C, H, W, K)
        return token_loss(rearrange(logits, "b c h w k -> b (c h w) k"), tokens=values.flatten(1))

    def values(self, batch: Batch) -> Tensor:
        """Values of a batch to learn, (B, C, H, W) int64. Raises ColorError for color, where gray is learned."""
        if self.grid is not None:
            return rearrange(batch["tokens"], "b (h w) -> b 1 h w", h=self.grid.height, w=self.grid.width)
        image = batch["image"] if self.config.data.in_channels == 3 else one_channel(batch["image"])
        return to_levels(image).round().long()  # exact: images of 8 bits

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        """Samples under the classes of held-out images; tokens need the tokenizer to be shown."""
        if self.grid is not None and self.load_tokenizer is None:
            return
        tokenizer = None if self.load_tokenizer is None else self.load_tokenizer().to(self.worker.device)
        for part in parts:
            (height, width), generators = self.values(part).shape[2:], preview_generators(self.seed, part["position"])
            size, conditions = {"height": height, "width": width}, Conditions(self.conditions(part), {})
            values = generate_grid(self.learner.snapshot(), conditions, generators=generators, **size)  # (B, C, H, W)
            yield [from_levels(values) if tokenizer is None else tokenizer.detokenize(values[:, 0])]
