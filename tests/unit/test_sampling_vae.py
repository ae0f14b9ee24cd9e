"""Laws of images from a VAE's prior."""

from typing import Any

import pytest
import torch

from components.configuration.sampling import ModelSampling
from components.models.autoencoder import Autoencoder
from components.sampling.generators.one_model import sample_vae
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan

NETWORK = {
    "resolution": 16,
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "latent_channels": 4,
    "bottleneck": {"kind": "gaussian"},
    "reconstruction": "discretized_logistic",
}


def model_of(**changes: Any) -> SamplingModel:
    torch.manual_seed(0)
    network = NETWORK | changes
    return SamplingModel(
        "vae", "autoencoder", network, {"resolution": 16}, Autoencoder(**network).eval(), None, ModelSampling()
    )


def test_a_image_depends_on_its_seed_and_not_on_its_batch() -> None:
    model = model_of()
    together = sample_vae(model, [Plan(seed=seed) for seed in (3, 1, 2)])
    assert together.shape == (3, 3, 16, 16)
    alone = sample_vae(model, [Plan(seed=1)])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_an_autoencoder_with_codes_is_refused() -> None:
    model = model_of(bottleneck={"kind": "vq_ema", "codebook_size": 16})
    with pytest.raises(ValueError, match="stage vae is no VAE"):
        sample_vae(model, [Plan()])
