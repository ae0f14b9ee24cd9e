"""Training of priors: next-token prediction over images' tokens (Esser et al., 2021, section 3.2).

With a text_loss_weight, over the tokens of texts too (Ramesh et al., 2021, section 2.2).

Shapes: B batch, N tokens an image, L text length, M condition tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.trainings import PriorTraining
from components.models.autoencoder import Autoencoder
from components.models.losses.cross_entropy import text_loss, text_nats, token_loss
from components.models.transformer import JointLogits, Transformer
from components.sampling.autoregressive import generate
from components.training.batches import png_grid, to_batch, with_positions
from components.training.building import make_network
from components.training.conditioning import conditions_of, dropped_conditions
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.randomness import derive_seed, sample_uniforms

PREVIEW_SAMPLES = 8


class PriorLosses(NamedTuple):
    """Losses of a prior over a part of a batch."""

    loss: Tensor  # ()  the weighted sum of both
    tokens: Tensor  # ()  nats a token of the image
    text: Tensor  # ()  nats a token of the text; 0 where it is a condition only


class PriorTask(LearnerTask[Any]):
    """Trains a transformer to predict the tokens of images under conditions."""

    def __init__(
        self,
        config: PriorTraining,
        *,
        dataset_info: DatasetInfo,
        grid: TokenGrid,
        load_tokenizer: Callable[[], Autoencoder] | None = None,
        worker: Worker = ALONE,
    ) -> None:
        """`load_tokenizer` loads the network from tokens to images, for previews; None: no previews."""
        self.config, self.dataset_info, self.grid = config, dataset_info, grid
        self.seed = config.optimization.seed
        self.load_tokenizer, self.worker, self.parts_matter = load_tokenizer, worker, config.network.dropout > 0
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info, grid)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        totals = torch.zeros(3, device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            losses = self.trained_losses(part)
            self.learner.backward(losses.loss * share)
            totals += torch.stack(losses).detach() * share
        norm = self.learner.step(step)
        loss, tokens, text = totals.unbind()
        metrics = {"loss": loss, "bits_per_token": tokens / math.log(2), "grad_norm": norm}
        return metrics | ({"text_bits_per_token": text / math.log(2)} if self.config.text_loss_weight else {})

    def trained_losses(self, part: Batch) -> PriorLosses:
        """Losses of a part, with tokens corrupted and conditions dropped by the recipe."""
        conditions = dropped_conditions(part, self.config.conditioning, self.dataset_info, seed=self.seed)
        return self.losses(self.learner.forward, part, conditions, inputs=self.corrupted(part))

    def losses(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor], *, inputs: Tensor) -> PriorLosses:
        """Mean negative log likelihoods of a batch's tokens and, with a text_loss_weight, of the texts.

        Args:
            inputs: (B, N), the tokens for the network, corrupted or not.
        """
        weight = self.config.text_loss_weight
        with self.learner.autocast():
            logits = network(inputs, **conditions, **self.wanted_logits)
        if not isinstance(logits, JointLogits):
            tokens = token_loss(logits, tokens=batch["tokens"])
            return PriorLosses(tokens, tokens, torch.zeros_like(tokens))
        tokens = token_loss(logits.tokens, tokens=batch["tokens"])
        text = text_loss(logits.text, text=learned_text(conditions["text"], original=batch["text"]))
        return PriorLosses((1 - weight) * tokens + weight * text, tokens, text)

    @property
    def wanted_logits(self) -> dict[str, bool]:
        return {"with_text": True} if self.config.text_loss_weight > 0 else {}

    def corrupted(self, batch: Batch) -> Tensor:
        """Tokens (B, N), each replaced at random with probability token_corruption, like taming's pkeep."""
        config, tokens, position = self.config, batch["tokens"], batch["position"]
        if config.token_corruption == 0:
            return tokens
        shape = (2, tokens.shape[1])
        draws = sample_uniforms(self.seed, position, stream="corruption", shape=shape, device=tokens.device)
        replaced, other = draws.unbind(1)
        random = (other.double() * self.grid.codebook_size).long()  # (B, N) in [0, K)
        return torch.where(replaced < config.token_corruption, random, tokens)

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Bits/token of the averaged weights on held-out images with all conditions, and of their texts."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, nats, of_texts, words = self.learner.snapshot(), 0.0, 0.0, 0.0
        for part in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            with self.learner.autocast():
                logits = network(
                    part["tokens"], **conditions_of(part, self.config.conditioning.conditions), **self.wanted_logits
                )
            if isinstance(logits, JointLogits):
                text, count = text_nats(logits.text, text=part["text"])
                of_texts, words, logits = of_texts + float(text.sum()), words + float(count.sum()), logits.tokens
            nats += float(token_loss(logits, tokens=part["tokens"])) * len(part["position"])
        bits = {"held_out_bits_per_token": nats / len(batch["position"]) / math.log(2)}
        return bits | ({"held_out_text_bits_per_token": of_texts / words / math.log(2)} if words else {})

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the conditions of held-out images, decoded by the tokenizer.

        None where weights are in shards: every single token would gather all of them.
        """
        if self.load_tokenizer is None or self.worker.shards:
            return {}
        batch, tokenizer = preview_batch(held_out, self.worker), self.load_tokenizer().to(self.worker.device)
        network, parts = self.learner.snapshot(), held_out_parts(batch, self.learner, max_batch=self.max_batch)
        images = [token_images(self.sampled(network, part), tokenizer, self.grid) for part in parts]
        return {"samples": png_grid(torch.cat(images), columns=len(batch["position"]))}

    def sampled(self, network: Transformer, part: Batch) -> Tensor:
        """Tokens (B, N) under the part's conditions."""
        conditions = conditions_of(part, self.config.conditioning.conditions)
        return generate(
            network,
            generators=preview_generators(self.seed, part["position"]),
            label=conditions.get("label"),
            text=conditions.get("text"),
            condition=conditions.get("condition"),
        )


def learned_text(text: Tensor, *, original: Tensor) -> Tensor:
    """Texts (B, L) to learn from, with pads (0) in place of dropped texts."""
    return original * (text == original).all(dim=1, keepdim=True)


def preview_batch(held_out: Arrays, worker: Worker) -> Batch:
    """The first held-out samples as a batch on the device."""
    first = {name: column[:PREVIEW_SAMPLES] for name, column in held_out.items()}
    return with_positions(to_batch(first, worker.device))


def preview_generators(seed: int, position: Tensor) -> list[torch.Generator]:
    """A generator for each of the positions (B,), with equal random numbers at each preview."""
    return [torch.Generator().manual_seed(derive_seed(seed, "preview", place)) for place in position.tolist()]


def token_images(tokens: Tensor, tokenizer: Autoencoder, grid: TokenGrid) -> Tensor:
    """Decodes tokens (B, N) to images (B, 3, H, W)."""
    return tokenizer.detokenize(rearrange(tokens, "b (h w) -> b h w", h=grid.height))
