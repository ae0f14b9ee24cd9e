"""A tiny real training of every network of the catalogue, the same numbers each time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from components.training.batches import to_batch
from components.training.learner import Learner
from components.training.loop import Task
from tests import tiny_autoencoders
from tests.tiny_text_image import TEXT_IMAGE
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


def learners_of(task: Any) -> list[Learner]:
    return [learner for learner in vars(task).values() if isinstance(learner, Learner)]


def whole_graph(network: nn.Module) -> None:
    """Compile a network without a code generator, and refuse to leave the graph anywhere."""
    network.compile(backend="eager", fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
