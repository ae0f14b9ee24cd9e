"""Device, precision and batch size of trained models; README.md says what a precision means where."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from components.configuration.optimization import Precision
from components.models.devices import autocast, products

SIGNS = ("out of memory", "ALLOC_FAILED")  # of torch and CUDA; of cuBLAS and cuDNN
T = TypeVar("T")
BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions that multiply: two sets of x86, and that of Arm
# Kinds of devices where networks train and sample in fp32, whatever they have: every processor learns the same, and
# small models more than in bf16, which saves a third of the time there.
IN_FP32 = ("cpu",)


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
    """Tells whether training and sampling on the device compute in bf16; never on a CPU."""
    return precision == "bf16" and device.type not in IN_FP32 and native_bf16(device)


@contextmanager
def sampling_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks on the device sample as the precision says."""
    with products(precision), autocast(device, enabled=computes_bf16(precision, device)):
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
