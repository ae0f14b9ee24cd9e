"""What `precision` means on each device: the one policy of training, sampling and measuring.

| precision | GPU | CPU that trains | CPU that samples |
|---|---|---|---|
| `fp32` | products in fp32, TF32 off for matrices and convolutions alike | fp32 | fp32 |
| `tf32` | products in TF32 (10 bits of 23) for both, sums in fp32 | fp32 | fp32 |
| `bf16` | products in bf16 by autocast, where the GPU multiplies it by itself, else as `fp32` | likewise | fp32 |

torch's own defaults differ: TF32 for convolutions, none for matrices. Weights, optimizer and averages are fp32 always.

Under autocast these compute in fp32 all the same, with TF32 off, for a rounding there would be noise in what counts:
last layers of U-Net, DiT and diffusion prior (the prediction), classifiers' pooling and logits, weights under spectral
norm, statistics of every norm, softmax, distances to a codebook, embeddings of contrastive encoders, perceptual
features once they are compared, and all losses. Likelihoods and distances between images are measured in fp32, whatever
the model trained and samples in.

The same request gives the same image in whatever company: on a CPU within one gray level. On a GPU in bf16 a batch of
another size may take other kernels, whose roundings differ by 2^-8 of a value: the same image to the eye, and a token
or a value that is drawn where two are as likely may be another. `fp32` there rounds by 2^-24, but no kernel promises.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from components.configuration.precision import Precision
from components.models.autocast import autocast
from components.sampling.device import native_bf16


def computes_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether a training on the device computes in bf16."""
    return precision == "bf16" and native_bf16(device)


def samples_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether sampling on the device computes in bf16. A CPU keeps fp32, and the same image in whatever company."""
    return device.type != "cpu" and computes_bf16(precision, device)


def state_products(precision: Precision) -> None:
    """Say for this process how products in fp32 are computed, for matrices and convolutions alike."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """As `state_products`, inside alone: for what works in processes of others."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    state_products(precision)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def sampling_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks on the device sample as the precision says."""
    bf16 = samples_bf16(precision, device)
    with products(precision), autocast(device, enabled=bf16):
        yield
