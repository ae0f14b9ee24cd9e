"""Held-out bits/dim of models with a likelihood of whole images.

The likelihood is exact (PixelCNN, Row LSTM) or a bound (VAE).

A diffusion model's bound has terms over t: `likelihood_study.py`. Both measure the same images, a dimension being an
8-bit value of a channel that the model knows.

Shapes: N images, C colors, H W their pixels, K values.
"""

import io
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from components.configuration.families import family_of
from components.evaluation.likelihood_study import STREAM, BoundJob, condition_of, pixels_of, standard_error
from components.models.autoencoder import Autoencoder
from components.models.bottleneck import GaussianBottleneck
from components.models.diffusion.corruption import to_levels
from components.models.losses.reconstruction import discretized_logistic_nll
from components.runtime.pool import Pool, file_name, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import random_stream


class ImageBitsWorker:
    """Actor of the pool that measures bits/dim of the images of a job."""

    def __init__(self, model: Artifact, files: Store, *, seed: int) -> None:
        with model.local_copy() as folder:
            self.model = load_model(model.stage, folder, device=best_device())
        self.files, self.seed = files, seed

    def __call__(self, job: BoundJob) -> BoundJob:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, bits=measure_bits(self.model, job, seed=self.seed))
        write_job(self.files, job.name, buffer.getvalue())
        return job


@torch.no_grad()
def measure_bits(model: SamplingModel, job: BoundJob, *, seed: int) -> np.ndarray:
    """Bits/dim of each image under the image's own label, (N,) float64.

    Images pass alone, so the cut into jobs changes no bit.
    """
    found = []
    for place, image in enumerate(pixels_of(model, job.image).to(model.device).split(1)):
        if family_of(model.kind).likelihood == "bound":
            assert isinstance(model.module, Autoencoder)
            nats = bound_nats(model.module, image, random_stream(seed + job.first + place, STREAM))
        else:
            condition = condition_of(model, label=int(job.label[place]), caption=job.caption[place])
            nats = exact_nats(model, image, condition)
        found.append(nats / (image.numel() * math.log(2)))
    return np.array(found)


def bound_nats(network: Autoencoder, image: Tensor, generator: torch.Generator) -> float:
    """Negative bound of a VAE on an image (1, 3, H, W), in nats, with a single draw of the latent.

    Kingma & Welling, 2014, equation 3.
    """
    noise = torch.randn(1, *network.latent_shape, generator=generator).to(image.device)
    output, encoded = network(image, noise=noise)
    return float(discretized_logistic_nll(output, image=image).double().sum() + encoded.losses["kl_loss"].double())


def exact_nats(model: SamplingModel, image: Tensor, condition: dict[str, Tensor]) -> float:
    """-log p of an image (1, C, H, W) in nats: the sum over values, each given all earlier values."""
    values = to_levels(image).round().long()  # exact: they were 8-bit images
    logits = rearrange(model.module(values, **condition), "1 c h w k -> (c h w) k").double()
    return float(F.cross_entropy(logits, values.flatten(), reduction="sum"))


def check_likelihood(model: SamplingModel) -> None:
    """Raises ValueError, with a message of one line, for a model without a likelihood of 8-bit values."""
    network, likelihood = model.module, family_of(model.kind).likelihood
    if likelihood == "exact" and model.settings.get("resolution") is None:
        raise ValueError(f"{model.name} knows tokens; only a likelihood of pixels compares")
    if likelihood == "bound":
        vae = isinstance(getattr(network, "bottleneck", None), GaussianBottleneck)
        if not vae or model.network.get("reconstruction") != "discretized_logistic":
            raise ValueError(
                f"{model.name} has no bound on 8-bit values; train with bottleneck gaussian, reconstruction "
                "discretized_logistic"
            )


def measure_images(jobs: Sequence[BoundJob], model: Artifact, *, seed: int, files: Store, pool: Pool) -> Iterator[Any]:
    """Measures the jobs with missing files; yields each job when the file is written."""
    yield from pool.finish(partial(ImageBitsWorker, model, files, seed=seed), jobs, files=files)


def read_bits(files: Store, jobs: Sequence[BoundJob]) -> np.ndarray:
    """Bits/dim of all images in the order of the jobs, (N,)."""
    found = []
    for job in jobs:
        with np.load(io.BytesIO(files.read(file_name(job.name))), allow_pickle=False) as arrays:
            found.append(arrays["bits"])
    return np.concatenate(found)


def summarize_bits(bits: np.ndarray, *, png: np.ndarray) -> dict[str, float]:
    """Metrics from bits (N,) and png (N,) of the same images, named like a diffusion model's bound."""
    return {
        "held_out_bits_per_dim": float(bits.mean()),
        "held_out_bits_per_dim_standard_error": standard_error(bits),
        "png_bits_per_dim": float(png.mean()),
    }


def bits_table(bits: np.ndarray, *, png: np.ndarray, exact: bool) -> dict[str, Any]:
    """Columns and rows for the report: bits/dim of the model, and of the images as PNGs."""
    name = "exact" if exact else "bound, one draw of the latent"
    return {
        "columns": ["likelihood", "bits/dim", "standard error", "images"],
        "rows": [
            [name, float(bits.mean()), standard_error(bits), len(bits)],
            ["as PNG", float(png.mean()), standard_error(png), len(png)],
        ],
    }
