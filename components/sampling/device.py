"""Device, precision and batch size of trained models.

What `precision` means on each device, the one policy of training, sampling and measuring:

| precision | GPU | CPU that trains | CPU that samples |
|---|---|---|---|
| `fp32` | products in fp32, TF32 off for matrices and convolutions alike | fp32 | fp32 |
| `tf32` | products in TF32 (10 bits of 23) for both, sums in fp32 | fp32 | fp32 |
| `bf16` | products in bf16 by autocast, where the GPU multiplies it by itself, else as `fp32` | likewise | fp32 |

torch's own defaults differ: TF32 for convolutions, none for matrices; sums of bf16 products partly in bf16, here in
fp32. Weights, optimizer and averages are fp32 always.

Under autocast these compute in fp32 all the same, for a rounding there would be noise in what counts:

| in fp32 | of |
|---|---|
| embeddings of times and noise levels | diffusion networks; of U-Nets also the projections in each block, as in ADM |
| predictions | last layers of U-Net, DiT and diffusion prior |
| pixels | last layers of decoders and of the GAN's generator |
| logits | classifiers with their pooling, discriminators; transformers and pixel networks, where no gradient is taken |
| embeddings | projections of contrastive encoders |
| inside | statistics of norms, softmax, weights under spectral norm |
| compared | distances to a codebook, without TF32 too; perceptual features; all losses |
| measured | likelihoods and distances between images, whatever the model trained and samples in, without TF32 too |

Training multiplies the logits of a large codebook in bf16 (`layers.logits_of`).

The same request gives the same image in whatever company: on a CPU within one gray level. On a GPU in bf16 a batch of
another size may take other kernels, whose roundings differ by 2^-8 of a value: the same image to the eye, and a token
or a value that is drawn where two are as likely may be another. `fp32` there rounds by 2^-24, but no kernel promises.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from components.configuration.optimization import Precision
from components.models.devices import autocast, products

SIGNS = ("out of memory", "ALLOC_FAILED")  # of torch and CUDA; of cuBLAS and cuDNN
T = TypeVar("T")
BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions of x86 and Arm


def best_device() -> torch.device:
    """A GPU where torch can use one, else the processor.
    `CUDA_VISIBLE_DEVICES=` in the environment hides every GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16(device: torch.device) -> bool:
    """Tells whether a device multiplies bf16 in hardware; emulated it takes three times as long as fp32.
    On processors oneDNN multiplies. Where torch (before 2.11) doesn't say what a processor has, it has none."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.backends.mkldnn.is_available() and any(capabilities.get(name, False) for name in BF16)
    return True


def computes_bf16(precision: Precision, device: torch.device) -> bool:
    """Tells whether training on the device computes in bf16."""
    return precision == "bf16" and native_bf16(device)


def samples_bf16(precision: Precision, device: torch.device) -> bool:
    """Tells whether sampling on the device computes in bf16.
    A CPU keeps fp32, and the same image in whatever company."""
    return device.type != "cpu" and computes_bf16(precision, device)


@contextmanager
def sampling_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks on the device sample as the precision says."""
    bf16 = samples_bf16(precision, device)
    with products(precision), autocast(device, enabled=bf16):
        yield


class Room:
    """The largest batch size known to fit a device: half of every batch size that failed."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most
        self.tried = 0  # samples at a time for which it was found

    def work(self, count: int, make: Callable[[int], T]) -> T:
        """Calls `make` with a batch size, of `count` samples in all, that fits in memory; returns the result.
        Raises what `make` raises, out of memory too where not even one sample has room."""
        for size in halves(max(1, min(self.most, count))):
            try:
                return make(size)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.most = -(-size // 2)
            free(self.device)  # here, where no error holds what was made until then
        raise AssertionError("halves end with 1")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tells whether an error means that a device, or a library on the device, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def halves(share: int) -> Iterator[int]:
    """Yields `share`, its half, its quarter, … down to 1; rounded up."""
    yield share
    while share > 1:
        share = -(-share // 2)
        yield share


def free(device: torch.device) -> None:
    """Frees the memory of failed attempts, so that the next attempt starts from an empty cache.
    Compiled networks are dropped too: after a second size they would be compiled for any size, and round otherwise."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
