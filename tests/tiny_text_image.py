"""Tiny real networks of DALL-E 2's and Imagen's generators, their tasks, and a caption tokenizer that fits them."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.configuration.trainings import ClassifierTraining, ContrastiveTraining, DiffusionPriorTraining
from components.data.ingest import train_bpe
from components.models.contrastive import ContrastiveEncoder
from components.sampling.frozen_text import ContrastiveText
from components.sampling.model import TextCondition
from components.training.frozen import Encoder, image_encoder, text_encoder
from tests.tiny_training import SHARED, diffusion_config, make_task

CAPTIONS = ("a red circle", "a blue square", "two green circles", "a red square")


def contrastive_config(**changes: Any) -> ContrastiveTraining:
    numbers = {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 2}
    numbers |= {"embedding_dim": 6, "text_dim": 8, "text_layers": 1, "text_heads": 2, "max_shift": 1}
    return ContrastiveTraining.of(**(SHARED | numbers | changes))


def tiny_bpe() -> Tokenizer:
    return Tokenizer.from_str(train_bpe(CAPTIONS * 2, vocab_size=280))


def frozen_contrastive() -> ContrastiveText:
    """An untrained encoder of 8 pixels, with its tokenizer."""
    torch.manual_seed(3)
    bpe = tiny_bpe()
    dataset_info = DatasetInfo(num_classes=3, vocab_size=bpe.get_vocab_size(), text_length=6)
    network = ContrastiveEncoder(**contrastive_config().network_arguments(dataset_info)).eval()
    return ContrastiveText(network, TextCondition(bpe, 6))


def load_frozen_image(device: torch.device) -> Encoder:
    return image_encoder(frozen_contrastive().network.to(device))


def load_frozen_text_tower(device: torch.device) -> Encoder:
    text = frozen_contrastive()
    text.network.to(device)
    return text_encoder(text)


def prior_config(**changes: Any) -> DiffusionPriorTraining:
    numbers = {"resolution": 8, "model_dim": 16, "num_layers": 2, "num_heads": 2, "cond_drop_prob": 0.3}
    numbers |= {"num_train_timesteps": 50}
    return DiffusionPriorTraining.of(**(SHARED | numbers | changes))


PRIOR_DATASET_INFO = DatasetInfo(num_classes=1, image_embedding_dim=6, text_states_dim=8, text_states_length=6)


def prior_task(config: Any, **options: Any) -> Any:
    """A task whose conditions come from frozen networks."""
    loaders = (load_frozen_image, load_frozen_text_tower)
    return make_task(config, dataset_info=PRIOR_DATASET_INFO, load_encoders=loaders, **options)


def decoder_config(**changes: Any) -> DiffusionTraining:
    """DALL-E 2's decoder, and with a single condition Imagen's base; `prior_task` makes its task too."""
    conditions = {"conditions": ("text_states", "image_embedding"), "text_conditioning": "cross_attention"}
    return diffusion_config(**(conditions | changes))


def classifier_config(**changes: Any) -> ClassifierTraining:
    numbers = {"resolution": 8, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
    numbers |= {"attention_resolutions": (4,), "head_dim": 8, "max_shift": 1, "mirror": True}
    numbers |= {} if "process" in changes else {"num_train_timesteps": 50}
    return ClassifierTraining.of(**(SHARED | numbers | changes))


TEXT_IMAGE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # its configuration, and its task
    "contrastive": (contrastive_config, make_task),
    "classifier": (classifier_config, make_task),
    "diffusion_prior": (prior_config, prior_task),
}
