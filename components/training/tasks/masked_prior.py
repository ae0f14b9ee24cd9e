"""Training of masked priors: tokens behind masks from visible tokens (MaskGIT).

Source: Chang et al., 2022, section 3.1.

Shapes: B batch, N tokens an image.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.trainings import MaskedPriorTraining
from components.models.autoencoder import Autoencoder
from components.models.devices import to_device
from components.models.losses.cross_entropy import masked_token_loss
from components.models.transformer import MaskedTransformer
from components.sampling.maskgit import STEPS, maskgit
from components.training.batches import png_grid, to_batch, with_positions
from components.training.building import make_network
from components.training.conditioning import conditions_of, dropped_conditions
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.randomness import sample_integers, sample_uniform, sample_uniforms
from components.training.tasks.prior import preview_batch, preview_generators, token_images

EVALUATION_DRAWS = 4  # masks for each held-out image


def training_masks(seed: int, position: Tensor, *, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Masked tokens of each sample, (B, N) bool: ⌈N cos(π/2 · r)⌉ at random places, r ~ U(0, 1).

    Number and places depend on (seed, position) alone.
    """
    ratio = torch.cos(math.pi / 2 * sample_uniform(seed, position, stream="mask_ratio").double())
    counts = to_device((ratio * num_tokens).ceil().long(), device)
    return random_masks(seed, position, counts=counts, num_tokens=num_tokens, stream="mask")


def evaluation_masks(
    seed: int, position: Tensor, *, num_tokens: int, draw: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Like `training_masks`, with numbers drawn uniformly from 1..N, for the bound on the likelihood."""
    stream = f"evaluation_{draw}"
    counts = 1 + sample_integers(seed, position, stream=f"{stream}_count", high=num_tokens, device=device)
    return random_masks(seed, position, counts=counts, num_tokens=num_tokens, stream=stream)


def random_masks(seed: int, position: Tensor, *, counts: Tensor, num_tokens: int, stream: str) -> Tensor:
    """Masks (B, N) with `counts` (B,) tokens in each row, every set of places equally likely."""
    draws = sample_uniforms(seed, position, stream=stream, shape=(num_tokens,), device=counts.device)
    places = draws.argsort(dim=1, stable=True)
    ranks = places.argsort(dim=1)  # (B, N), a random permutation of 0..N-1
    return ranks < counts[:, None]


class MaskedPriorTask(LearnerTask[Any]):
    """Trains a transformer to predict masked tokens, under the images' conditions."""

    def __init__(
        self,
        config: MaskedPriorTraining,
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

    @property
    def num_tokens(self) -> int:
        return self.grid.height * self.grid.width

    @property
    def masked_on(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens, "device": self.worker.device}

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss = self.trained_loss(part)
            self.learner.backward(loss * share)
            total += loss.detach() * share
        norm = self.learner.step(step)
        return {"loss": total, "grad_norm": norm}

    def trained_loss(self, part: Batch) -> Tensor:
        """Loss of a part, with masked tokens and dropped conditions."""
        config = self.config
        conditions = dropped_conditions(part, config.conditioning, self.dataset_info, seed=self.seed)
        masked = training_masks(self.seed, part["position"], **self.masked_on)
        return self.loss(self.learner.forward, part, conditions, masked=masked, label_smoothing=config.label_smoothing)

    def loss(
        self,
        network: nn.Module,
        batch: Batch,
        conditions: dict[str, Tensor],
        *,
        masked: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        """Mean cross-entropy in nats a masked token, ()."""
        inputs = batch["tokens"].masked_fill(masked, self.grid.codebook_size)  # the mask token follows the last code
        with self.learner.autocast():
            logits = network(inputs, **conditions)
        return masked_token_loss(logits, tokens=batch["tokens"], masked=masked, label_smoothing=label_smoothing)

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Upper bound of the bits/token of the averaged weights on held-out images.

        The bound is for tokens drawn one by one in random order.
        """
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, nats, seed = self.learner.snapshot(), 0.0, self.seed
        for part in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            conditions = conditions_of(part, self.config.conditioning.conditions)
            for draw in range(EVALUATION_DRAWS):
                masked = evaluation_masks(seed, part["position"], draw=draw, **self.masked_on)
                loss = self.loss(network, part, conditions, masked=masked, label_smoothing=0.0)
                nats += float(loss) * len(part["position"]) / EVALUATION_DRAWS
        return {"held_out_bits_per_token_bound": nats / len(batch["position"]) / math.log(2)}

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the conditions of held-out images, made visible by the tokenizer."""
        if self.load_tokenizer is None:
            return {}
        batch, tokenizer = preview_batch(held_out, self.worker), self.load_tokenizer().to(self.worker.device)
        network, parts = self.learner.snapshot(), held_out_parts(batch, self.learner, max_batch=self.max_batch)
        images = [token_images(self.sampled(network, part), tokenizer, self.grid) for part in parts]
        return {"samples": png_grid(torch.cat(images), columns=len(batch["position"]))}

    def sampled(self, network: MaskedTransformer, part: Batch) -> Tensor:
        """Tokens (B, N) under the part's conditions."""
        conditions = conditions_of(part, self.config.conditioning.conditions)
        return maskgit(
            network,
            generators=preview_generators(self.seed, part["position"]),
            steps=min(STEPS, self.num_tokens),
            label=conditions.get("label"),
            text=conditions.get("text"),
            condition=conditions.get("condition"),
        )
