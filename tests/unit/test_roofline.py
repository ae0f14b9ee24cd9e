"""Rules of the roofline: what an operation reads, writes and computes, and how long that takes at least."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.roofline import BANDWIDTH, KINDS, MEMORY, PEAKS, PRODUCTS, Cost, Roofline, by_kind

SHAPE = (2, 32, 8, 8)
NUMBERS = 2 * 32 * 8 * 8
NHWC = torch.channels_last
KERNEL = 32 * 32 * 3 * 3


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def image(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return meta(*SHAPE, dtype=dtype)


def convolve(x: Tensor) -> Tensor:
    return F.conv2d(x, meta(32, 32, 3, 3).to(memory_format=NHWC), padding=1)


def backward_of_norm() -> None:
    x, moments, weight = image(torch.float32), meta(2, 8, dtype=torch.float32), meta(32, dtype=torch.float32)
    torch.ops.aten.native_group_norm_backward(x, x, moments, moments, weight, 2, 32, 64, 8, [True, True, True])


COUNTED: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "a view": (lambda: image().flatten(1).t(), {}),
    "a sum": (lambda: image() + image(), {"others": 3 * 2 * NUMBERS}),
    "a number added in place": (lambda: image().add_(1), {"others": 2 * 2 * NUMBERS}),
    "zeros": (lambda: image().zero_(), {"others": 2 * NUMBERS}),
    "repeated numbers": (lambda: image() * meta(1, 1, 1, 1).expand(SHAPE), {"others": 2 * 2 * NUMBERS + 2}),
    "a table": (lambda: F.embedding(meta(3, dtype=torch.long), meta(1000, 4)), {"others": 2 * 3 * 4 * 2}),
    "another type": (lambda: image().float(), {"casts": 6 * NUMBERS}),
    "another order": (lambda: image().contiguous(memory_format=NHWC), {"layout": 4 * NUMBERS}),
    "both": (lambda: image().to(torch.float32, memory_format=NHWC), {"layout": 6 * NUMBERS}),
    "a group norm": (
        lambda: F.group_norm(image(torch.float32), 8),
        {"norms": 4 * (3 * NUMBERS + 2 * 2 * 8)},
    ),
    "a group norm backward": (backward_of_norm, {"norms": 4 * (5 * NUMBERS + 2 * 2 * 8 + 3 * 32)}),
    "a layer norm": (lambda: F.layer_norm(meta(4, 8), (8,)), {"norms": 2 * 2 * 4 * 8 + 2 * 4 * 4}),
    "a product": (lambda: meta(4, 8) @ meta(8, 2), {"products": 2 * (32 + 16 + 8)}),
    "a convolution": (
        lambda: convolve(image().to(memory_format=NHWC)),
        {"layout": 2 * 2 * (NUMBERS + KERNEL), "products": 2 * (2 * NUMBERS + KERNEL)},
    ),
    "a convolution of another order": (
        lambda: convolve(image()),
        {"layout": 2 * 2 * (KERNEL + NUMBERS), "products": 2 * (2 * NUMBERS + KERNEL)},
    ),
    "a convolution in NCHW": (
        lambda: F.conv2d(image(), meta(32, 32, 3, 3), padding=1),
        {"layout": 2 * 2 * (2 * NUMBERS + KERNEL), "products": 2 * (2 * NUMBERS + KERNEL)},
    ),
}


@pytest.mark.parametrize("what", COUNTED)
def test_bytes_are_those_of_the_rules(what: str) -> None:
    do, expected = COUNTED[what]
    with (roofline := Roofline()):
        do()
    found = by_kind(roofline.costs, "bytes")
    assert found == {kind: expected.get(kind, 0) for kind in KINDS}


def test_operations_of_a_product_are_two_for_each_multiplication() -> None:
    with (roofline := Roofline()):
        convolve(image())
    assert sum(cost.flops for cost in roofline.costs) == 2 * NUMBERS * 32 * 9


def test_an_operation_takes_the_longer_of_its_bytes_and_its_operations() -> None:
    peak = PEAKS[torch.bfloat16]
    assert Cost("products", PRODUCTS * peak, 0.5 * BANDWIDTH * MEMORY, peak).seconds == pytest.approx(1)
    assert Cost("products", 0.5 * PRODUCTS * peak, BANDWIDTH * MEMORY, peak).seconds == pytest.approx(1)
