"""Study of a codebook: how much a code tells of a patch's color, and codes of the image's class.

Objects are discrete, and so are color, shape and number: the lecture's reason for codes. Here it is measured. The class
is read by a linear probe (Alain and Bengio, 2016, "Understanding intermediate layers using linear classifier probes")
from counts of codes, and beside it from counts of as many colors, so that what codes know beyond color is seen.
Shapes: N images, H W pixels, h w their grid of codes, K codes, C classes.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from components.configuration.config import Config, refuse
from components.data.encoding import describe_autoencoder, open_autoencoder
from components.data.held_out import read_split
from components.data.shards import View
from components.evaluation.features import joined, read_arrays
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import ShardImages, held_out_parts, trained_parts
from components.evaluation.metrics import share_error
from components.evaluation.study import ArrayWorker, Findings, ModelStudy, StudyPlan
from components.models.autoencoder import Autoencoder
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once

KNOWN, ASKED = "training", "held-out"  # images that are learned from, and judged by
PATCHES = "code_patches"  # name of the image
TABLE = "What codes tell"  # title of the table
CODES, SHOWN = 8, 10  # rows of patches, and patches in each
REACH = 2  # cells shown around a patch
RIDGE = 0.01  # of the mean square of the features
LEAST_RIDGE = 1e-9  # of features that are all equal: their weights are 0


class CodesJob(NamedTuple):
    """Images to encode into a file."""

    name: str
    part: ShardImages


class CodesStudy(ModelStudy["CodesStudyConfig"]):
    """Codes of training images explain those of held-out images; the input is `model`."""

    def plan(self) -> StudyPlan:
        """A job for each shard of images. Raises ValueError for a set that holds no image out."""
        side = describe_autoencoder(self.models["model"]).resolution
        config, index = self.config, self.index
        sets = {
            KNOWN: trained_parts(index, samples=config.samples, seed=config.seed, resolution=side),
            ASKED: held_out_parts(index, resolution=side, limit=config.held_out_samples),
        }
        refuse(sets[ASKED][0].split == "train", f"{index.source} holds no image out; set images.holdout_fraction")
        groups = {}
        for name, parts in sets.items():
            groups[name] = [CodesJob(f"{name}-{row}", part) for row, part in enumerate(parts)]
        return StudyPlan(groups)

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that encodes the images of a job."""
        return ArrayWorker(lambda: open_autoencoder(self.models["model"]).to(best_device()), coded, self.files)

    def images_of(self, job: CodesJob) -> int:
        return job.part.num_images

    def findings(self, plan: StudyPlan, measured: Any) -> Findings:
        """A table of shares read rightly, with chance, and patches by code."""
        network = describe_autoencoder(self.models["model"])
        parts = [[read_arrays(self.files, job.name) for job in plan.groups[name]] for name in (KNOWN, ASKED)]
        first, second = (CodedImages(**joined(part)) for part in parts)
        count, patch = len(second.label), network.resolution // second.codes.shape[1]
        color = explained_color(first, second, codes=network.codebook_size)
        what = f"color of a patch of {patch}² pixels: variance explained"
        rows: list[list[Any]] = [[what, "its code", 100 * color, None, 0.0, count]]
        summary = {"color_explained": color}
        if (classes := len(self.index.classes)) > 1:
            levels = max(2, round(network.codebook_size ** (1 / 3)))
            chance = float((second.label == np.bincount(first.label).argmax()).mean())
            for name, size in (("codes", network.codebook_size), ("colors", levels**3)):
                title = "counts of its codes" if name == "codes" else f"counts of {size} colors of its patches"
                words = (each.codes if name == "codes" else each.words(levels) for each in (first, second))
                known, asked = (counted_words(each, size=size) for each in words)
                right = float((linear_probe(known, asked, first.label, classes=classes) == second.label).mean())
                figures = [100 * right, 100 * share_error(right, count), 100 * chance, count]
                rows.append([f"class of an image, of {classes}", title, *figures])
                summary[f"class_from_{name}"] = right
        columns = ["what", "read from", "%", "standard error", "% by chance", "N"]
        headline = {f"% of {name.replace('_', ' ')}": 100 * value for name, value in summary.items()}
        return Findings({}, {TABLE: {"columns": columns, "rows": rows}}, summary, headline, drawn_patches(second))


class CodesStudyConfig(Config):
    """Numbers of training images to learn from and of held-out images to judge by."""

    study: ClassVar[type] = CodesStudy

    samples: int = Field(3000, ge=2)
    held_out_samples: int = Field(1024, ge=2)
    seed: int = Field(0, ge=0)


class CodedImages(NamedTuple):
    """Images with the code and the mean color of each patch."""

    images: np.ndarray  # (N, H, W, 3) uint8
    label: np.ndarray  # (N,) int64
    codes: np.ndarray  # (N, h, w) int64
    colors: np.ndarray  # (N, h, w, 3) float32 in [0, 1]

    def words(self, levels: int) -> np.ndarray:
        """Colors cut to `levels` a channel, as numbers below levels³: (N, h, w) int64."""
        cut = np.minimum((self.colors * levels).astype(np.int64), levels - 1)
        return cut @ np.array([levels**2, levels, 1])


@torch.inference_mode()
def coded(network: Autoencoder, job: CodesJob) -> dict[str, np.ndarray]:
    """Fields of `CodedImages` for the images of a job. Raises ShardError."""
    device, codes, colors, part = next(network.parameters()).device, [], [], job.part
    split = read_split(part.index, part.split, View(part.resolution), limit=part.num_images)
    for some in torch.from_numpy(split.image).split(most_at_once(part.resolution)):
        images = from_uint8(some.to(device))
        codes.append(network.tokenize(images))
        colors.append(adaptive_avg_pool2d((images + 1) / 2, codes[-1].shape[1:]))
    values = torch.cat(codes), torch.cat(colors).movedim(1, -1)
    return CodedImages(split.image, split.label, *(value.cpu().numpy() for value in values))._asdict()


def explained_color(known: CodedImages, asked: CodedImages, *, codes: int) -> float:
    """Share of the variance of patch colors explained by codes: 1 - SSE / SST.
    A code stands for the mean color of its patches in `known`, and for that of all where it has none; errors are of
    `asked`."""
    every, numbers = known.colors.reshape(-1, 3).astype(np.float64), known.codes.ravel()
    counts = np.bincount(numbers, minlength=codes)
    sums = np.stack([np.bincount(numbers, channel, minlength=codes) for channel in every.T], axis=1)
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], every.mean(axis=0))
    colors = asked.colors.reshape(-1, 3).astype(np.float64)
    errors = np.square(colors - means[asked.codes.ravel()]).sum()
    return float(1 - errors / np.square(colors - colors.mean(axis=0)).sum())


def counted_words(words: np.ndarray, *, size: int) -> Tensor:
    """Square roots of the shares of each of `size` words in an image: (N, h, w) -> (N, size) float64.
    Roots let rare words count (the Hellinger distance of two images is that of their roots)."""
    counts = np.stack([np.bincount(each.ravel(), minlength=size) for each in words])
    return torch.from_numpy(np.sqrt(counts / words[0].size))


def linear_probe(known: Tensor, asked: Tensor, labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Classes (N,) of `asked` by ridge regression of one-hot `labels` on `known`, features (N, D)."""
    mean = known.mean(dim=0)
    inputs, targets = known - mean, one_hot(torch.from_numpy(labels), classes).double()
    shares = targets.mean(dim=0)
    square = inputs.T @ inputs
    square.diagonal().add_((RIDGE * square.trace() / len(square)).clamp(min=LEAST_RIDGE))
    weights = torch.linalg.solve(square, inputs.T @ (targets - shares))
    return ((asked - mean) @ weights + shares).argmax(dim=1).numpy()


def drawn_patches(held_out: CodedImages) -> dict[str, bytes]:
    """Grid (PNG) of held-out patches, a row for each of a few codes, from often to rare.
    A row has at most one patch of an image; codes in fewer than SHOWN images are left out."""
    images = {code: np.flatnonzero((held_out.codes == code).any(axis=(1, 2))) for code in np.unique(held_out.codes)}
    counts = np.bincount(held_out.codes.ravel())
    usual = sorted((code for code in images if len(images[code]) >= SHOWN), key=lambda code: -counts[code])
    if not usual:
        return {}
    chosen = [usual[place] for place in np.unique(np.linspace(0, len(usual) - 1, CODES).astype(int))]
    blocks = []
    for code in chosen:
        numbers = images[code][np.linspace(0, len(images[code]) - 1, SHOWN).astype(int)]
        share = 100 * counts[code] / held_out.codes.size
        patches = [cut_patch(held_out.images[number], held_out.codes[number] == code) for number in numbers]
        blocks.append(GridBlock(f"code {code}, {share:.2g} % of all", patches))
    return {PATCHES: render_blocks(blocks, columns=SHOWN)}


def cut_patch(image: np.ndarray, has_code: np.ndarray) -> np.ndarray:
    """The middle one of the cells (h, w) with the code, and REACH cells around, of an image (H, W, 3).
    White stands beyond the edges."""
    cells = np.argwhere(has_code)
    row, column = cells[len(cells) // 2]
    cell = len(image) // len(has_code)
    margin, side = REACH * cell, (2 * REACH + 1) * cell
    wide = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    return wide[row * cell : row * cell + side, column * cell : column * cell + side]
