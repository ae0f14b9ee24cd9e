"""Quality of an image-to-image model's restorations of degraded held-out images, task by task.

Palette; Saharia et al., 2022.
Shapes: N images, H W their pixels; images are uint8.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field

from components.data.images import jpeg_compressed
from components.evaluation.features import MeasureConfig
from components.evaluation.generated import jobs_of, load_cascade, read_jobs
from components.evaluation.grids import GridBlock, readable, render_blocks
from components.evaluation.study import Findings, ModelStudy, StudyPlan
from components.models.diffusion import corruption
from components.models.diffusion.corruption import MASK_TASKS, NUMBERS, blurred, downsample, gray
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel
from components.sampling.plan import random_stream
from components.sampling.requests import Request

JPEG_QUALITIES = (5, 10, 20)  # qualities of the paper's evaluation
ROUNDING = 1 / 12  # variance of rounding to 8 bits: no squared error is measured below
HIDDEN = 127  # gray level of unknown pixels in shown images
SHOWN = 8


class Damaged(NamedTuple):
    """Images after a degradation, and the requests to restore the images."""

    name: str  # "inpainting", "jpeg quality 5", "super resolution 4 times"
    shown: np.ndarray  # (N, H, W, 3) what is left of the image, gray elsewhere
    mask: np.ndarray  # (N, H, W) bool, True where pixels are to be made
    requests: tuple[Request, ...]


class RestorationStudy(ModelStudy["RestorationConfig"]):
    """Held-out images degraded in every trained way, and restored; the input is `cascade`."""

    def degraded(self) -> tuple[SamplingModel, np.ndarray, list[Damaged]]:
        """The model, held-out images (N, H, W, 3), and all degradations, equal in every run.
        Raises ValueError for a cascade that does not work on images, or a set that holds no image out."""
        maker = load_cascade(self.models["cascade"]).makers.get("translate")
        if maker is None:
            raise ValueError("this cascade has no image-to-image model whose restorations could be measured")
        model, trained = maker.first, maker.first.settings
        held_out = self.held_out(resolution=trained["resolution"], limit=self.config.samples)
        ways = {"tasks": trained["tasks"], "mask_area": trained["mask_area"]}
        ways |= {"factors": trained["super_resolution_factors"], "seed": self.config.seed}
        asked = asked_of(model, held_out.label, held_out.caption)
        return model, held_out.image, damage(held_out.image, asked=asked, **ways)

    def plan(self) -> StudyPlan:
        model, _, damaged = self.degraded()
        groups = {each.name: jobs_of(each.name.replace(" ", "_"), each.requests) for each in damaged}
        side = model.settings["resolution"]
        return StudyPlan(groups, self.sets(groups, f"image.{model.name}", resolution=side))

    def findings(self, plan: StudyPlan, measured: dict[str, float]) -> Findings:
        """A table of dB before and after, distances and colorfulness, and images of each degradation."""
        _, originals, damaged = self.degraded()
        rows, blocks, figures = [], [], dict[str, float]()
        for each in damaged:
            restored, name = read_jobs(plan.groups[each.name], self.files).finished, readable(each.name)
            before, after = (psnr(images, originals, each.mask) for images in (each.shown, restored))
            colors = [colorfulness(images) for images in (restored, originals)]
            rows.append([name, before, after, measured.get(each.name), *colors, len(originals)])
            blocks.append(GridBlock(f"{name}, given ({before:.1f} dB)", list(each.shown[:SHOWN])))
            blocks.append(GridBlock(f"{name}, restored ({after:.1f} dB)", list(restored[:SHOWN])))
            slug = each.name.replace(" ", "_")
            figures |= {f"psnr_{slug}": after, f"psnr_{slug}_degraded": before, f"colorfulness_{slug}": colors[0]}
        blocks.append(GridBlock("original", list(originals[:SHOWN])))
        columns = ["degradation", "given, dB", "restored, dB", "Fréchet distance"]
        columns += ["colorfulness", "of originals", "N"]
        table = {"Restored held-out images": {"columns": columns, "rows": rows}}
        shown = [f"psnr_{each.name.replace(' ', '_')}" for each in damaged] + ["colorfulness_colorization"]
        headline = {name: figures[name] for name in shown if name in figures}
        return Findings({}, table, figures, headline, {"restored": render_blocks(blocks, columns=SHOWN)})


class RestorationConfig(MeasureConfig):
    """Number of degraded images, and the settings of distances to the training images."""

    stage_version = 2  # colorfulness too

    study: ClassVar[type] = RestorationStudy

    samples: int = Field(64, ge=2)  # held-out images, each degraded in every way


def damage(
    originals: np.ndarray,
    *,
    tasks: Sequence[str],
    mask_area: tuple[float, float],
    factors: Sequence[int],
    asked: Sequence[Request] | None = None,
    seed: int = 0,
) -> list[Damaged]:
    """Degrades each image in every way of the model's training; equal for equal seeds.
    `originals`: (N, H, W, 3). `mask_area`, `factors`: as in training; each factor of super-resolution is a row of its
    own. `asked`: N requests with the label or prompt of each image, where the model takes one. `seed`: of masks and of
    what fills them."""
    bare = [Request()] * len(originals) if asked is None else asked
    damaged = []
    for task in tasks:
        for name, shown, given, masks in ways(task, originals, mask_area, factors, seed):
            every = np.ones(shown.shape[:3], dtype=bool)
            requests = [
                request.replace(generator="translate", seed=seed + number, task=task, image=encode_png(given[number]))
                for number, request in enumerate(bare)
            ]
            if masks is not None:
                pixels = np.where(masks, np.uint8(255), np.uint8(0))
                requests = [r.replace(mask=encode_png(own)) for r, own in zip(requests, pixels, strict=True)]
            damaged.append(Damaged(name, shown, every if masks is None else masks, tuple(requests)))
    return damaged


def ways(
    task: str, originals: np.ndarray, area: tuple[float, float], factors: Sequence[int], seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Ways of a task to degrade: name, images as shown, images as given to the model, masks or None."""
    image = from_uint8(originals)
    if task in MASK_TASKS:
        make = corruption.inpainting_mask if task == "inpainting" else corruption.border_mask
        streams = (random_stream(seed, f"{task} of image {number}") for number in range(len(originals)))
        drawn = (torch.rand(NUMBERS, generator=stream).tolist() for stream in streams)
        masks = np.stack([make(numbers, originals.shape[1], area=area).numpy() for numbers in drawn])
        yield task, np.where(masks[..., None], np.uint8(HIDDEN), originals), originals, masks
    elif task == "colorization":
        left = to_uint8(gray(image))
        yield task, left, left, None
    elif task == "jpeg":
        for quality in JPEG_QUALITIES:
            left = np.stack([jpeg_compressed(original, quality=quality) for original in originals])
            yield f"jpeg quality {quality}", left, left, None
    else:
        for factor in factors:
            small = to_uint8(downsample(image, image.shape[-1] // factor))
            yield f"super resolution {factor} times", to_uint8(blurred(image, factor)), small, None


def asked_of(model: SamplingModel, labels: np.ndarray, captions: Sequence[str]) -> list[Request]:
    """Requests with the labels (N,) or captions of the images, as far as the model accepts conditions."""
    bare = [Request()] * len(captions)
    if model.classes:
        bare = [request.replace(label=int(label)) for request, label in zip(bare, labels, strict=True)]
    if model.text is None:
        return bare
    most = model.text.most_tokens
    fitting = [c if c.strip() and model.text.num_tokens(c) <= most else None for c in captions]
    return [request.replace(prompt=caption) for request, caption in zip(bare, fitting, strict=True)]


def psnr(made: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the mask's pixels (N, H, W) of all images, dB."""
    errors = np.square(made.astype(np.float64) - original)[mask]
    return 10 * math.log10(255**2 / max(float(errors.mean()), ROUNDING))


def colorfulness(images: np.ndarray) -> float:
    """Mean colorfulness of images (N, H, W, 3): 0 where all is gray, 109 where people say "extremely".
    Source: Hasler and Süsstrunk (2003), "Measuring Colourfulness in Natural Images", equation 3: deviation of the two
    opponent colors, and 0.3 of the distance of their mean from gray. It asks whether there is color, not which."""
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])  # (2, N, H, W)
    spread, mean = (np.hypot(*found) for found in (opponents.std((2, 3)), opponents.mean((2, 3))))  # (N,)
    return float((spread + 0.3 * mean).mean())
