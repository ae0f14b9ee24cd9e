"""Training of DALL-E 2's diffusion prior (Ramesh et al., 2022, section 2.2).

The prior predicts image embeddings, by a frozen encoder of the batch's images, from noised embeddings and a text, by
mean squared error.

Shapes: B batch, E embedding_dim, L text length, T features of a text's state.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.trainings import DiffusionPriorTraining
from components.models.diffusion.objective import make_objective
from components.training.batches import to_batch, with_positions
from components.training.building import make_network
from components.training.conditioning import conditions_of, dropped_conditions
from components.training.frozen import LoadEncoder, encoded
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.randomness import sample_normal, sample_uniform


class DiffusionPriorTask(LearnerTask[Any]):
    """Trains a transformer to predict the image embedding under a text.

    `load_encoders` add the columns image_embedding, text_states and text_embedding, and the null of the last two.
    """

    def __init__(
        self,
        config: DiffusionPriorTraining,
        *,
        dataset_info: DatasetInfo,
        load_encoders: Sequence[LoadEncoder] = (),
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.dataset_info, self.worker = config, dataset_info, worker
        self.seed = config.optimization.seed
        self.parts_matter = config.network.dropout > 0
        self.objective = make_objective(config.process.objective())
        self.encoders = [load(worker.device) for load in load_encoders]
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for plain, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss = self.trained_loss(encoded(plain, self.encoders)) * share
            self.learner.backward(loss)
            total += loss.detach()
        norm = self.learner.step(step)
        return {"loss": total, "grad_norm": norm}

    def trained_loss(self, part: Batch) -> Tensor:
        """Loss of a part, with conditions dropped by the recipe."""
        conditions = dropped_conditions(part, self.config.conditioning, self.dataset_info, seed=self.seed)
        return self.losses(self.learner.forward, part, conditions).mean()

    def losses(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """Mean squared error of each embedding, (B,)."""
        x_t, time, noise = self.noised(batch)
        with self.learner.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return self.objective.loss(output.float(), x_0=batch["image_embedding"], noise=noise, x_t=x_t, time=time)

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (B, E), time (B,) and noise (B, E) of each position."""
        seed, position, x_0 = self.seed, batch["position"], batch["image_embedding"]
        time = self.objective.times(sample_uniform(seed, position, stream="timestep", device=x_0.device))
        noise = sample_normal(seed, position, stream="noise", shape=tuple(x_0.shape[1:]), device=x_0.device)
        return self.objective.add_noise(x_0, noise, time), time, noise

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss of the averaged weights on held-out pairs, at times that never change, and two cosines.

        Cosines with the image's embedding: of the prior's guess from pure noise in one step, and of the text's
        embedding.
        """
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, rows = self.learner.snapshot(), []
        for plain in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            part = encoded(plain, self.encoders)
            conditions, x_0 = conditions_of(part, self.config.conditioning.conditions), part["image_embedding"]
            guess = self.guess(network, part, conditions)
            rows.append(
                torch.stack(
                    [
                        self.losses(network, part, conditions),
                        F.cosine_similarity(guess, x_0),
                        F.cosine_similarity(part["text_embedding"], x_0),
                    ]
                )
            )
        loss, guessed, text = torch.cat(rows, dim=1).mean(dim=1).tolist()
        return {"held_out_loss": loss, "held_out_prior_cosine": guessed, "held_out_text_cosine": text}

    def guess(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """The network's prediction from pure noise, near the mean embedding under the text, (B, E)."""
        time = self.objective.times(torch.full(batch["position"].shape, 1 - 2**-24, device=self.worker.device))
        noise = sample_normal(
            self.seed,
            batch["position"],
            stream="guess",
            shape=tuple(batch["image_embedding"].shape[1:]),
            device=self.worker.device,
        )
        return self.objective.predict_x_0(
            self.objective.apply(network, noise, time, **conditions), x_t=noise, time=time
        )
