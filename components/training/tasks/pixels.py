"""Training of models of an image's exact likelihood: gated PixelCNN and Row LSTM.

Van den Oord et al. (2016). Images are the 8-bit values of RGB or gray pixels (dimensions of 256 values), or grids of
tokens.

Shapes: B batch, C colors, H W height and width, K num_values, N tokens an image.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.trainings import PixelTraining
from components.models.autoencoder import Autoencoder
from components.models.diffusion.corruption import from_levels, to_levels
from components.models.losses.cross_entropy import token_loss
from components.sampling.images import one_channel
from components.sampling.pixelwise import PixelNetwork, generate_grid
from components.training.batches import png_grid, to_batch, with_positions
from components.training.building import make_network
from components.training.conditioning import conditions_of, dropped_conditions
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.tasks.prior import preview_batch, preview_generators

EVALUATION_BATCH = 16  # the logits of 32² RGB images take 3 MB each


class PixelTask(LearnerTask[Any]):
    """Trains a network to predict each value of an image from earlier values, under a class or nothing."""

    def __init__(
        self,
        config: PixelTraining,
        *,
        dataset_info: DatasetInfo,
        grid: TokenGrid | None = None,
        load_tokenizer: Callable[[], Autoencoder] | None = None,
        worker: Worker = ALONE,
    ) -> None:
        """Learns tokens of a `grid`, or pixels for None.

        `load_tokenizer` loads the network from tokens to images; without it tokens have no previews.
        """
        self.config, self.dataset_info, self.grid = config, dataset_info, grid
        self.seed = config.optimization.seed
        self.load_tokenizer, self.worker, self.parts_matter = load_tokenizer, worker, config.network.dropout > 0
        self.unit = "dim" if grid is None else "token"
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info, grid)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss = self.trained_loss(part) * share
            self.learner.backward(loss)
            total += loss.detach()
        norm = self.learner.step(step)
        return {"loss": total, f"bits_per_{self.unit}": bits(total), "grad_norm": norm}

    def trained_loss(self, part: Batch) -> Tensor:
        """Loss of a part, with conditions dropped by the recipe."""
        conditions = dropped_conditions(part, self.config.conditioning, self.dataset_info, seed=self.seed)
        return self.loss(self.learner.forward, part, conditions)

    def loss(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """Mean negative log likelihood in nats a value, ()."""
        values = self.values(batch)
        with self.learner.autocast():
            logits = network(values, **conditions)  # (B, C, H, W, K)
        return token_loss(rearrange(logits, "b c h w k -> b (c h w) k"), tokens=values.flatten(1))

    def values(self, batch: Batch) -> Tensor:
        """Values of a batch to learn, (B, C, H, W) int64. Raises ColorError for color, where gray is learned."""
        if self.grid is not None:
            return rearrange(batch["tokens"], "b (h w) -> b 1 h w", h=self.grid.height, w=self.grid.width)
        image = batch["image"] if self.config.data.in_channels == 3 else one_channel(batch["image"])
        return to_levels(image).round().long()  # exact: images of 8 bits

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Bits/dim, or bits/token, of the averaged weights on held-out images with all conditions."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, nats = self.learner.snapshot(), torch.zeros((), dtype=torch.float64)
        for part in held_out_parts(batch, self.learner, max_batch=self.max_batch, most=EVALUATION_BATCH):
            conditions = conditions_of(part, self.config.conditioning.conditions)
            nats += self.loss(network, part, conditions).cpu() * len(part["position"])
        return {f"held_out_bits_per_{self.unit}": float(bits(nats / len(batch["position"])))}

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the classes of held-out images; tokens are decoded by the tokenizer."""
        if self.grid is not None and self.load_tokenizer is None:
            return {}
        batch, load = preview_batch(held_out, self.worker), self.load_tokenizer
        tokenizer = None if load is None else load().to(self.worker.device)
        network, parts = self.learner.snapshot(), held_out_parts(batch, self.learner, max_batch=self.max_batch)
        values = [self.sampled(network, part) for part in parts]  # each (B, C, H, W)
        images = [from_levels(v) if tokenizer is None else tokenizer.detokenize(v[:, 0]) for v in values]
        return {"samples": png_grid(torch.cat(images), columns=len(batch["position"]))}

    def sampled(self, network: PixelNetwork, part: Batch) -> Tensor:
        """Values (B, C, H, W) under the part's classes."""
        height, width = self.values(part).shape[2:]
        generators = preview_generators(self.seed, part["position"])
        label = conditions_of(part, self.config.conditioning.conditions).get("label")
        return generate_grid(network, generators=generators, height=height, width=width, label=label)


def bits(nats: Tensor) -> Tensor:
    return nats / math.log(2)
