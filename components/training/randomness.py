"""All randomness of training, by (seed, position) or (seed, step): never by call order, never by rank.

A sample's position is its place in the ordered stream of the whole run, so its draws do not depend on the number of
workers, on gradient accumulation or on the step of a resume. Scalars come straight from a hash; tensors from a
generator seeded by it, on the device that needs them. Positions are on the host, where hashes are made: on a device the
host would have to wait for them.

Shapes: B batch."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from components.models.devices import to_device


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for the place `parts` of the run `seed` (blake2b, so that near places are unrelated)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_on(device: torch.device | str) -> torch.Generator:
    """An unseeded generator for tensors on the device; on the meta device, without numbers, any generator."""
    device = torch.device(device)
    return torch.Generator("cpu" if device.type == "meta" else device)


def step_generator(seed: int, step: int, *, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for a step as a whole, equal on all ranks."""
    return generator_on(device).manual_seed(derive_seed(seed, stream, step))


def sample_uniform(seed: int, position: Tensor, *, stream: str, device: torch.device | str = "cpu") -> Tensor:
    """A number in [0, 1) for each sample: (B,) on the host -> (B,) float32 on `device`."""
    numbers = [derive_seed(seed, stream, place) / 2**63 for place in position.tolist()]
    # float32 holds 24 bits below 1: no number is rounded up to 1.0.
    return to_device(torch.tensor([int(number * 2**24) / 2**24 for number in numbers]), device)


def sample_integers(
    seed: int, position: Tensor, *, stream: str, high: int, device: torch.device | str = "cpu"
) -> Tensor:
    """An integer in [0, high) for each sample: (B,) on the host -> (B,) int64 on `device`.
    The bias is below high / 2^63."""
    numbers = [derive_seed(seed, stream, place) % high for place in position.tolist()]
    return to_device(torch.tensor(numbers), device)


def sample_normal(
    seed: int, position: Tensor, *, stream: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise for each sample: (B,) on the host -> (B, *shape) float32 on `device`."""
    return filled(Tensor.normal_, torch.empty(len(position), *shape, device=device), seed, stream, position)


def sample_gumbel(
    seed: int, position: Tensor, *, stream: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Gumbel noise -log(-log u) for each sample: (B,) on the host -> (B, *shape) float32 on `device`."""
    noise = filled(Tensor.exponential_, torch.empty(len(position), *shape, device=device), seed, stream, position)
    return -noise.clamp_(min=torch.finfo(torch.float32).tiny).log_()


def sample_uniforms(
    seed: int, position: Tensor, *, stream: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Numbers in [0, 1) for each sample: (B,) on the host -> (B, *shape) float32 on `device`."""
    return filled(Tensor.uniform_, torch.empty(len(position), *shape, device=device), seed, stream, position)


def filled(fill: Callable[..., Tensor], numbers: Tensor, seed: int, stream: str, position: Tensor) -> Tensor:
    """The same tensor (B, ...), each row filled by a generator of its position."""
    generator = generator_on(numbers.device)
    for row, place in zip(numbers, position.tolist(), strict=True):
        fill(row, generator=generator.manual_seed(derive_seed(seed, stream, place)))
    return numbers
