"""A tiny real training of every network of the catalogue, the same numbers each time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.parallel import ALONE, Worker
from components.training.step_model import learners_of
from tests import tiny_autoencoders
from tests.checkpoints import read_folder, write_checkpoint
from tests.tiny_text_image import TEXT_IMAGE, decoder_config, prior_task
from tests.tiny_training import batches, config_of, make_task

LAST_STEP = 20  # when every loss has begun
BOTTLENECKS = ("vae", "vq_vae", "dvae", "fsq")  # beside the tokenizer's
OWN = ("tokenizer", "prior", "masked_prior", "pixelcnn", "row_lstm", "base", "dit", "gan")
IMAGE_ATTENTION = {"kind": "image_attention_unet", "model_channels": 8, "channel_mult": (1, 2), "head_dim": 8}
IMAGE_ATTENTION |= {"attention_resolutions": (4,), "image_token_dim": 8, "image_patch_size": 2}
BASES: dict[str, dict[str, Any]] = {
    "cross_attention": {"text_conditioning": "cross_attention"},
    "spatial_transformer": {"text_conditioning": "spatial_transformer", "class_token_dim": 8},
    "image_attention": {"network": IMAGE_ATTENTION, "conditions": ("condition_image",), "condition_member": "depth"},
}


class Kind(NamedTuple):
    config: Callable[..., Any]
    task: Callable[[Any], Task] = make_task


TRAININGS = {
    **{name: Kind(partial(config_of, name)) for name in OWN},
    **{name: Kind(partial(tiny_autoencoders.config_of, name)) for name in BOTTLENECKS},
    **{name: Kind(partial(config_of, "base", **about)) for name, about in BASES.items()},
    **{name: Kind(*made) for name, made in TEXT_IMAGE.items()},
}

WITHOUT_DROPOUT = ("tokenizer", "dit", "gan", "contrastive", *tiny_autoencoders.RECIPES)
FROZEN = ("decoder", "diffusion_prior")  # conditions come from frozen networks
CONFIGS: dict[str, Callable[..., Any]] = {
    "decoder": decoder_config,
    **{name: make_config for name, (make_config, _) in TEXT_IMAGE.items()},
    **{name: partial(tiny_autoencoders.config_of, name) for name in tiny_autoencoders.RECIPES},
}


def made(kind: str, *, worker: Worker = ALONE, parts: int | None = None, **changes: Any) -> tuple[Any, Any]:
    """Configuration and task of a kind, without dropout, which depends on ranks and parts."""
    plain = {} if kind in WITHOUT_DROPOUT else {"dropout": 0.0}
    config = CONFIGS.get(kind, partial(config_of, kind))(**plain | changes)
    return config, (prior_task if kind in FROZEN else make_task)(config, worker=worker, max_batch_per_device=parts)


def trained(name: str, prepare: Callable[[nn.Module], None] | None = None, **changes: Any) -> dict[str, Tensor]:
    """The weights after two steps of a training whose networks are first prepared; the last of them has all losses."""
    config = TRAININGS[name].config(**changes)
    task = TRAININGS[name].task(config)
    for learner in learners_of(task):
        if prepare is not None:
            prepare(learner.network)
    stream = batches(config, to_batch)
    for step in (1, LAST_STEP):
        task.train_step(next(stream), step)
    return {name: tensor.detach().clone() for name, tensor in task.state_dict()["weights"].items()}


def resumed(folder: Path, config: Any, broken_off: Task, make: Callable[[Any], Task], *, step: int = 4) -> Task:
    """Another task, which goes on from a checkpoint of one that broke off after so many steps, to the end."""
    write_checkpoint(folder / "resumed", broken_off.state_dict(), step=step)
    torch.rand(17)  # what happened in the process since must not matter
    task = make(config)
    taken, state = read_folder(folder / "resumed")
    task.load_state_dict(state)
    fit(task, batches(config, to_batch, start_step=taken), config.optimization, start_step=taken)
    return task


def whole_graph(network: nn.Module) -> None:
    """Compile a network without a code generator, and refuse to leave the graph anywhere."""
    network.compile(backend="eager", fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
