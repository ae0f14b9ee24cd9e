"""Training of the prior: next-token prediction over pictures' tokens (Esser et al., 2021, section 3.2).

Shapes: B batch, N tokens a picture, L text length.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from components.losses.likelihood import token_loss
from components.models.autoencoder import VQAutoencoder
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.training.batches import to_batch, with_positions
from components.training.conditioning import conditions_of, dropped_conditions
from components.training.config import Conditions, PriorConfig, TokenGrid
from components.training.learner import Learner, accumulated, seeded, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.previews import png_grid
from components.training.randomness import derive_seed

PREVIEW_SAMPLES = 8
EVALUATION_BATCH = 64


def transformer_arguments(config: PriorConfig, offers: Conditions, grid: TokenGrid) -> dict[str, Any]:
    """Arguments of the transformer for this recipe and data set; plain values, they go into the bundle."""
    text = "text" in config.conditions
    return {
        "codebook_size": grid.codebook_size,
        "num_tokens": grid.height * grid.width,
        "model_dim": config.model_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_classes": offers.num_classes if "label" in config.conditions else None,
        "vocab_size": offers.vocab_size if text else None,
        "text_length": offers.text_length if text else None,
        "dropout": config.dropout,
    }


class PriorTask:
    """One transformer that learns the tokens of pictures under their conditions."""

    def __init__(
        self,
        config: PriorConfig,
        *,
        offers: Conditions,
        grid: TokenGrid,
        load_tokenizer: Callable[[], VQAutoencoder] | None = None,
        worker: Worker = ALONE,
        max_batch_per_device: int | None = None,
    ) -> None:
        """`load_tokenizer` gives the network that turns tokens into pictures, for previews; None: no previews."""
        self.config, self.offers, self.grid = config, offers, grid
        self.load_tokenizer, self.worker, self.max_batch = load_tokenizer, worker, max_batch_per_device
        with seeded(config.seed):
            network = Transformer(**transformer_arguments(config, offers, grid))
        self.learner = Learner(network, config=config, worker=worker, ema_decay=config.ema_decay)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            conditions = dropped_conditions(part, self.config, self.offers)
            loss = self.loss(self.learner.forward, part, conditions) * share
            self.learner.backward(loss)
            total += loss.detach()
        taken, norm = self.learner.update(step)
        if taken:
            self.learner.average()
        return {"loss": total, "bits_per_token": total / math.log(2), "grad_norm": norm}

    def loss(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """Mean negative log likelihood in nats a token, ()."""
        with self.learner.autocast():
            logits = network(batch["tokens"], **conditions)
        return token_loss(logits, tokens=batch["tokens"])

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.learner.weights(), "learner": self.learner.progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["weights"], state["learner"])

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Bits a token of the averaged weights on held-out pictures under their own conditions."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, nats = self.learner.snapshot(), 0.0
        for part in split(batch, self.max_batch or EVALUATION_BATCH):
            conditions = conditions_of(part, self.config.conditions)
            nats += float(self.loss(network, part, conditions)) * len(part["position"])
        return {"held_out_bits_per_token": nats / len(batch["position"]) / math.log(2)}

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the conditions of held-out pictures, made visible by the tokenizer."""
        if self.load_tokenizer is None:
            return {}
        batch = to_batch({name: column[:PREVIEW_SAMPLES] for name, column in held_out.items()}, self.worker.device)
        generators = [
            torch.Generator().manual_seed(derive_seed(self.config.seed, "preview", sample))
            for sample in range(len(batch["tokens"]))
        ]
        conditions = conditions_of(batch, self.config.conditions)
        label, text = conditions.get("label"), conditions.get("text")
        tokens = generate(self.learner.snapshot(), generators=generators, label=label, text=text)
        tokenizer = self.load_tokenizer().to(self.worker.device)
        images = tokenizer.detokenize(rearrange(tokens, "b (h w) -> b h w", h=self.grid.height))
        return {"samples": png_grid(images, columns=len(images))}
