"""Agreement of generated images with the requested class or caption.

An independent classifier judges the class of an image. A contrastive encoder (Radford et al., 2021) ranks the caption
of an image among other captions.

Neither network had a part in making the images. Chance is what images reach whose labels or captions were shuffled.

Shapes: N images, n of a part, K classes, C captions, E embedding_dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.generated import read_job
from components.evaluation.guidance_study import judge
from components.evaluation.image_sets import ImagePart, in_batches, shrink
from components.models.contrastive import ContrastiveEncoder
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import SamplingModel, load_model

EQUAL = 6  # decimals: smaller differences of cosines depend on the order of computation and count as none


class AgreementConfig(Config):
    """Number of images to judge, and the seed of the sampled images."""

    samples: int = Field(128, ge=2)  # of each generator by label, as many by prompt, and as many held-out images
    seed: int = Field(0, ge=0)


class JobImages(NamedTuple):
    """The finished images of a job of `sample_jobs`."""

    files: Store
    job: str
    num_images: int

    def batches(self) -> Iterator[np.ndarray]:  # uint8 (n, H, W, 3)
        """Yields the finished images in batches, read from the store of the job."""
        yield from in_batches(read_job(self.job, self.files).finished)


class AskedPart(NamedTuple):
    """Images for one worker to judge, with the requested class id or caption number of each image."""

    images: ImagePart
    asked: tuple[int, ...]  # (n,)


class Agreement(NamedTuple):
    """Agreement of a set of images with the requests, with the chance level and the number of candidates."""

    count: int  # N
    accuracy: float  # share of images whose own class, or caption, comes first
    chance: float  # of the accuracy
    median_rank: float = 1.0  # of the own caption, from 1
    candidates: int = 1  # C

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, as the share of a binomial sample."""
        return (self.accuracy * (1 - self.accuracy) / self.count) ** 0.5


class ClassJudge:
    """Pool worker that returns the classes (n,) int64 of a part by a classifier of clean images."""

    def __init__(self, classifier: Artifact) -> None:
        self.model = load_judge("judge", classifier)

    def __call__(self, part: AskedPart) -> np.ndarray:
        return np.concatenate([judge(self.model, images) for images in seen_by(self.model, part)])


class CaptionRanker:
    """Pool worker that returns the rank (n,) of each image's own caption among C captions."""

    def __init__(self, matcher: Artifact, captions: Sequence[str]) -> None:
        self.model = load_judge("matcher", matcher)
        self.text = embed_captions(self.model, captions)  # (C, E)

    def __call__(self, part: AskedPart) -> np.ndarray:
        image = np.concatenate([embed_images(self.model, images) for images in seen_by(self.model, part)])
        return caption_ranks(image, self.text, np.array(part.asked))


def load_judge(name: str, model: Artifact) -> SamplingModel:
    """Loads a trained model on the best available device."""
    with model.local_copy() as folder:
        return load_model(name, folder, device=best_device())


def seen_by(model: SamplingModel, part: AskedPart) -> Iterator[np.ndarray]:
    """The images of a part, uint8 (n, S, S, 3), resized to the input size S of the model."""
    side = model.settings["resolution"]
    for images in part.images.batches():
        yield images if images.shape[1] == side else shrink(images, side)


@torch.no_grad()
def embed_images(model: SamplingModel, images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, S, S, 3) -> (n, E) of length 1."""
    assert isinstance(model.module, ContrastiveEncoder)
    return model.module.encode_image(from_uint8(images).to(model.device)).cpu().numpy()


@torch.no_grad()
def embed_captions(model: SamplingModel, captions: Sequence[str]) -> np.ndarray:
    """C captions -> (C, E) of length 1."""
    assert isinstance(model.module, ContrastiveEncoder)
    assert model.text is not None
    return model.module.encode_text(model.text.encode(captions).to(model.device)).embedding.cpu().numpy()


def caption_ranks(image: np.ndarray, text: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank of each image's own caption by cosine among all captions, from 1.

    A caption of equal cosine counts as half.

    Args:
        image: (N, E) of length 1.
        text: (C, E) of length 1.
        own: (N,) the number of each image's caption.

    Returns (N,) float64 in [1, C], whose mean over all captions as the own one is (C + 1) / 2.
    """
    cosine = (image.astype(np.float64) @ text.astype(np.float64).T).round(EQUAL)  # (N, C)
    right = cosine[np.arange(len(image)), own][:, None]  # (N, 1)
    nearer, equal = (cosine > right).sum(axis=1), (cosine == right).sum(axis=1) - 1
    return 1 + nearer + equal / 2


def caption_agreement(ranks: np.ndarray, *, candidates: int) -> Agreement:
    """Agreement of ranks (N,) among `candidates` captions."""
    first = float((ranks == 1).mean())
    return Agreement(len(ranks), first, 1 / candidates, float(np.median(ranks)), candidates)


def class_agreement(seen: np.ndarray, asked: np.ndarray) -> Agreement:
    """Agreement of recognized classes (N,) with requested classes (N,).

    The chance is the mean over all orders of `asked`: more than 1 / K where some classes are frequent in both arrays.
    """
    num_classes = 1 + max(seen.max(), asked.max())
    shares = [np.bincount(classes, minlength=num_classes) / len(classes) for classes in (seen, asked)]  # (K,) each
    return Agreement(len(seen), float((seen == asked).mean()), float(shares[0] @ shares[1]))


def label_table(found: Mapping[str, Agreement]) -> dict[str, Any]:
    """Columns and rows for the report: accuracy by label of each set, beside the chance."""
    rows = [[name, each.accuracy, each.standard_error, each.chance, each.count] for name, each in found.items()]
    return {"columns": ["images", "accuracy", "its standard error", "chance", "N"], "rows": rows}


def prompt_table(found: Mapping[str, Agreement]) -> dict[str, Any]:
    """Columns and rows for the report: first ranks and median rank of captions, beside the chance."""
    rows = [
        [
            *(name, each.accuracy, each.standard_error, each.chance),
            *(each.median_rank, (each.candidates + 1) / 2, each.candidates, each.count),
        ]
        for name, each in found.items()
    ]
    columns = ["images", "own caption first", "its standard error", "chance", "median rank", "chance of it"]
    return {"columns": [*columns, "captions", "N"], "rows": rows}
