"""A tiny recipe of each kind of autoencoder that several tests share."""

from typing import Any

from components.configuration.trainings import AutoencoderTraining
from tests.tiny_training import autoencoder_config

SMALL = {"resolution": 8, "channel_mult": (1, 2), "adversarial_weight": 0.0}
CODES = {"codebook_size": 16, "codebook_dim": 4, "codebook_init": "data", "l2_normalize": False}
RECIPES: dict[str, dict[str, Any]] = {
    "vae": {**SMALL, "bottleneck": "gaussian", "reconstruction": "discretized_logistic"},
    "vae_gan": {**SMALL, "bottleneck": "gaussian", "kl_weight": 1e-2, "adversarial_weight": 0.8},
    "vq_vae": {**SMALL, "patch_shortcut": True, "bottleneck": {**CODES, "kind": "vq"}, "reconstruction": "mse"},
    "vq_vae_ema": {**SMALL, "codebook_init": "kmeans", "reconstruction": "discretized_logistic"},
    "dvae": {
        **SMALL,
        "bottleneck": {"kind": "gumbel", "codebook_size": 16, "codebook_dim": 8},
        **{"reconstruction": "logit_laplace", "kl_warmup_steps": 5, "temperature_steps": 15},
    },
    "fsq": {**SMALL, "bottleneck": {"kind": "fsq", "levels": (5, 4, 3)}},
}


def config_of(name: str, **changes: Any) -> AutoencoderTraining:
    return autoencoder_config(**(RECIPES[name] | changes))
