"""All randomness of training, by (seed, position) or (seed, step): never by call order, never by rank.

A sample's position is its place in the ordered stream of the whole run, so its draws do not depend on the number of
workers, on gradient accumulation or on the step of a resume. Scalars come straight from a hash; tensors from a
generator seeded by it, on the device that needs them. Positions are on the host, where hashes are made.

Random changes of a batch are shifts, mirroring, windows, and conditions dropped for classifier-free guidance (Ho &
Salimans, 2022). Networks without attention learn from windows, for a fraction of the memory, and sample whole images.

Shapes: B batch, H W pixels, S resolution, W window size."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from components.configuration.conditions import ConditionsConfig, DatasetInfo
from components.models.devices import to_device
from components.training.loop import Batch


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for the place `parts` of the run `seed` (blake2b, so that near places are unrelated)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def step_generator(seed: int, step: int, *, stream: str) -> torch.Generator:
    """A generator on the CPU for a step as a whole, equal on all ranks."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, step))


class Draws(NamedTuple):
    """Random numbers of a run's samples at positions (B,) on the host; streams are independent."""

    seed: int
    device: torch.device | str = "cpu"

    def uniform(self, position: Tensor, stream: str) -> Tensor:
        """A number in [0, 1) for each sample, (B,) float32."""
        numbers = [derive_seed(self.seed, stream, place) / 2**63 for place in position.tolist()]
        # float32 holds 24 bits below 1: no number is rounded up to 1.0.
        return to_device(torch.tensor([int(number * 2**24) / 2**24 for number in numbers]), self.device)

    def integers(self, position: Tensor, stream: str, *, high: int) -> Tensor:
        """An integer in [0, high) for each sample, (B,) int64."""
        numbers = [derive_seed(self.seed, stream, place) % high for place in position.tolist()]
        return to_device(torch.tensor(numbers), self.device)

    def normal(self, position: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
        """Gaussian noise for each sample, (B, *shape) float32."""
        return self.filled(Tensor.normal_, position, stream, shape)

    def gumbel(self, position: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
        """Gumbel noise -log(-log u) for each sample, (B, *shape) float32."""
        noise = self.filled(Tensor.exponential_, position, stream, shape)
        return -noise.clamp_(min=torch.finfo(torch.float32).tiny).log_()

    def uniforms(self, position: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1) for each sample, (B, *shape) float32."""
        return self.filled(Tensor.uniform_, position, stream, shape)

    def filled(self, fill: Callable[..., Tensor], position: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
        """Rows (B, *shape), each filled by a generator of its position; on meta nothing is."""
        numbers = torch.empty(len(position), *shape, device=self.device)
        generator = torch.Generator("cpu" if numbers.is_meta else numbers.device)
        for row, place in zip(numbers, position.tolist(), strict=True):
            fill(row, generator=generator.manual_seed(derive_seed(self.seed, stream, place)))
        return numbers


IMAGES = ("image", "low_res", "condition_image")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # of every BPE of this house


def shifted(image: Tensor, position: Tensor, *, seed: int, max_shift: int) -> Tensor:
    """Shifts each of (B, 3, H, W) by up to max_shift pixels each way, with edges repeated."""
    if max_shift == 0:
        return image
    draw = Draws(seed, image.device)
    top, left = (draw.integers(position, f"shift_{axis}", high=2 * max_shift + 1) for axis in ("y", "x"))
    padded = F.pad(image, [max_shift] * 4, mode="replicate")
    rows = top[:, None] + torch.arange(image.shape[2], device=image.device)  # (B, H)
    columns = left[:, None] + torch.arange(image.shape[3], device=image.device)  # (B, W)
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2)


def mirrored(image: Tensor, position: Tensor, *, seed: int) -> Tensor:
    """Exchanges left and right of half of (B, 3, H, W), drawn at random."""
    mirror = Draws(seed, image.device).integers(position, "mirror", high=2) == 1
    return torch.where(mirror[:, None, None, None], image.flip(3), image)


class Windows(NamedTuple):
    """A square window of each image, with its place on the host, for cuts without a wait."""

    top: Tensor  # (B,) int64
    left: Tensor  # (B,) int64
    size: int  # W

    def cut(self, image: Tensor) -> Tensor:
        """Cuts (B, C, S, S) to (B, C, W, W)."""
        corners = zip(image, self.top.tolist(), self.left.tolist(), strict=True)
        return torch.stack([each[:, y : y + self.size, x : x + self.size] for each, y, x in corners])


def draw_windows(seed: int, position: Tensor, *, resolution: int, size: int) -> Windows:
    """Draws a window inside each image, uniformly, by (seed, position)."""
    places = resolution - size + 1
    top, left = (Draws(seed).integers(position, f"window_{name}", high=places) for name in ("top", "left"))
    return Windows(top, left, size)


def cropped(tensors: Batch, windows: Windows) -> Batch:
    """Cuts the same window of every image of a batch, conditions included; other columns stay."""
    return {name: windows.cut(value) if name in IMAGES else value for name, value in tensors.items()}


def null_conditions(
    batch: Batch, names: Sequence[str], *, num_classes: int, null_condition: int = 0
) -> dict[str, Tensor]:
    """The null of each condition, in the place of a dropped one.
    The label after the last class, the encoding of an empty text, the token after the last one of condition images, an
    image or embedding of zeros; for outputs of a frozen text encoder that for an empty text, a column of the batch."""
    empty = {name: batch[f"null_{name}"] for name in names if f"null_{name}" in batch}
    fills = {"label": num_classes, "text": PAD_ID, "condition": null_condition}
    fills |= {"condition_image": 0, "image_embedding": 0}
    empty |= {name: torch.full_like(batch[name], fills[name]) for name in names if name in fills}
    if "text" in names:
        empty["text"][:, 0], empty["text"][:, 1] = BOS_ID, EOS_ID
    return empty


def dropped_conditions(
    batch: Batch, conditioning: ConditionsConfig, dataset_info: DatasetInfo, *, seed: int
) -> dict[str, Tensor]:
    """Replace conditions by nulls with probability cond_drop_prob, sample by sample.
    "joint" drops all of a sample's conditions together; "independent" draws for each."""
    null_condition = dataset_info.condition.codebook_size if dataset_info.condition else 0
    empty = null_conditions(
        batch, conditioning.conditions, num_classes=dataset_info.num_classes, null_condition=null_condition
    )
    mixed = {}
    for name in conditioning.conditions:
        value = batch[name]
        stream = "drop" if conditioning.cond_drop == "joint" else f"drop_{name}"
        drop = Draws(seed, value.device).uniform(batch["position"], stream) < conditioning.cond_drop_prob
        mixed[name] = torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
    return mixed
