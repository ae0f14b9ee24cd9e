"""How much a device has room for at a time: what says that its memory is full, and tries with half as much."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

SIGNS = ("out of memory", "ALLOC_FAILED")  # of torch and CUDA; of cuBLAS and cuDNN
T = TypeVar("T")


class Room:
    """The largest batch that a device has room for, as far as is known: half of each that was too large."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most
        self.tried = 0  # samples at a time for which it was found

    def work(self, count: int, make: Callable[[int], T]) -> T:
        """What `make` returns, called with the size of its batches, for so many samples in all.

        Raises what `make` raises, out of memory too where not even one sample has room.
        """
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
    """Whether a device, or a library on it, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def halves(share: int) -> Iterator[int]:
    """`share`, its half, the half of that, ... down to 1; rounded up."""
    yield share
    while share > 1:
        share = -(-share // 2)
        yield share


def free(device: torch.device) -> None:
    """Give back what tries left behind, so that the next one, and what follows, start from an empty cache.

    So it is with compiled networks: after a second size they would be compiled for any size, and round otherwise.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
