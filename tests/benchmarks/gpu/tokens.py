"""A transformer over the tokens of images: its training step and the decoding of tokens, ours beside GPT-2 of
transformers. Both have a token of the class before those of the image.
"""

from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.sampling import TokenSampling
from components.configuration.trainings import PriorTraining
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.sampling.device import sampling_in
from components.sampling.plan import Conditions
from components.training.learner import make_network
from components.training.parallel import Worker
from components.training.step_model import StepModel, counting
from components.training.tasks.prior import PriorTask
from tests.benchmarks.bench_prior import CACHES, SAMPLED, TOP_K, peer_transformer
from tests.benchmarks.gpu.case import Case, MakeStep, Side, bf16_on_gpu, counted, script_step, task_step
from tests.benchmarks.interleaving import Step

CLASSES = DatasetInfo(num_classes=1000)
LONG = {"total_steps": 500_000, "ema_decay": 0.0, "precision": "bf16", "log_every": 100}


class PriorSize(NamedTuple):
    side: int  # of the grid of tokens
    codebook_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    batch: int  # of training
    drawn: int  # images decoded at once

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(codebook_size=self.codebook_size, height=self.side, width=self.side)


MEDIUM = PriorSize(16, 1024, 1024, 24, 16, batch=32, drawn=16)  # GPT-2 medium's width and depth


def prior_training(size: PriorSize) -> PriorTraining:
    network = {"model_dim": size.model_dim, "num_layers": size.num_layers, "num_heads": size.num_heads}
    how = {"global_batch_size": size.batch, "learning_rate": 3e-4, "conditions": ("label",)}
    return PriorTraining.of(**network, **how, **LONG)


def peer_prior(size: PriorSize) -> GPT2LMHeadModel:
    """Classes are words behind the codes."""
    sizes = {"tokens": size.side**2, "width": size.model_dim, "layers": size.num_layers, "heads": size.num_heads}
    return peer_transformer(size.codebook_size + CLASSES.num_classes, **sizes)


def our_step(size: PriorSize, device: torch.device, compiled: bool) -> Step:
    training = prior_training(size).replace(compile_network=compiled)
    task = PriorTask(training, dataset_info=CLASSES, grid=size.grid, worker=Worker(device=device))
    tokens = torch.randint(size.codebook_size, (size.batch, size.side**2), device=device)
    label = torch.randint(CLASSES.num_classes, (size.batch,), device=device)
    return task_step(task, {"tokens": tokens, "label": label, "position": torch.arange(size.batch)})


def peer_step(size: PriorSize, device: torch.device, compiled: bool) -> Step:
    """As transformers' trainer: the model makes the loss itself, of all that follows the class."""
    label = size.codebook_size + torch.randint(CLASSES.num_classes, (size.batch, 1), device=device)
    tokens = torch.cat([label, torch.randint(size.codebook_size, (size.batch, size.side**2), device=device)], dim=1)

    def loss(network: nn.Module) -> Tensor:
        with bf16_on_gpu(device):
            return network(tokens, labels=tokens, use_cache=False).loss

    return script_step(peer_prior(size), loss, device=device, compiled=compiled, ema=False)


def prior_step(size: PriorSize = MEDIUM) -> Case:
    peer: MakeStep = partial(peer_step, size)
    model = StepModel(prior_training(size), CLASSES, grid=size.grid)
    ours = Side(partial(our_step, size), model.flops())
    with mock.patch("transformers.masking_utils.is_tracing", return_value=True):  # else it reads numbers
        return Case("prior_step", size.batch, ours, Side(peer, counted(peer)), model)


def our_decoding(size: PriorSize, device: torch.device, compiled: bool) -> Step:
    network: Transformer = make_network(prior_training(size), CLASSES, size.grid).eval().to(device)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(size.drawn)]
    conditions = Conditions({"label": torch.zeros(size.drawn, dtype=torch.int64, device=device)}, {})

    def decode() -> Tensor:
        with sampling_in("bf16", device):
            sampling = TokenSampling(top_k=TOP_K)
            return generate(network, conditions, generators=generators, sampling=sampling, compiled=compiled)

    return decode


def peer_decoding(size: PriorSize, device: torch.device, compiled: bool) -> Step:
    """With its static cache, which transformers compiles with CUDA graphs unless told not to, and weights in bf16."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = peer_prior(size).eval().to(device, dtype)
    condition = torch.full((size.drawn, 1), size.codebook_size, device=device)
    given = {"attention_mask": torch.ones_like(condition), "max_new_tokens": size.side**2}
    return lambda: model.generate(condition, **given, disable_compile=not compiled, **SAMPLED, **CACHES["static"])[
        :, 1:
    ]


def decoding(size: PriorSize = MEDIUM) -> Case:
    """Both sides need what ours computes: a static cache attends to places that are still empty too."""
    with torch.device("meta"), counting() as counter:
        our_decoding(size, torch.device("meta"), False)()
    flops = counter.get_total_flops()
    ours, peer = Side(partial(our_decoding, size), flops), Side(partial(peer_decoding, size), flops)
    return Case("decoding", size.drawn, ours, peer, in_a_row=1)
