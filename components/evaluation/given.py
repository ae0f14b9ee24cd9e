"""Figures of given images against a reference, both as users have them (`data/given.py`).

A reference may be published statistics: an npz file with `mu` and `sigma`, beside images or alone, as the reference
sets of ADM (Dhariwal & Nichol, 2021). Those stand for the distance of `inception`, the network and protocol that they
are of. Features are computed in this process, and kept in a folder `features` beside the images, where that can be
written.
Shapes: N images, D features.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from components.configuration.config import refuse
from components.data.given import NUMPY, given_images, open_archive
from components.evaluation.clip_score import ClipScore
from components.evaluation.features import (
    FEATURES,
    LOGITS,
    FeatureExtractor,
    FeatureJob,
    MeasureConfig,
    extractor_of,
    feature_job,
    joined,
    pack,
    read_arrays,
)
from components.evaluation.metrics import METRICS, Compared, Gaussian, counted, gaussian_from, gaussian_of, measured_row
from components.runtime.pool import write_job
from components.runtime.storage.artifact import look_at
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import absolute
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png
from components.sampling.requests import Request

logger = logging.getLogger("cascade")


def published_gaussian(uri: str) -> Gaussian | None:
    """The Gaussian of `mu` and `sigma` of an npz file; None for anything else."""
    if not uri.endswith(NUMPY):
        return None
    with open_archive(absolute(uri)) as archive:
        if not {"mu.npy", "sigma.npy"} <= {*archive.namelist()}:
            return None
        files = (io.BytesIO(archive.read(name)) for name in ("mu.npy", "sigma.npy"))
        return gaussian_from(*(np.load(file, allow_pickle=False) for file in files))


def measured_features(job: FeatureJob, extract: FeatureExtractor) -> dict[str, np.ndarray]:
    """Arrays (n, ...) by name of a part, from the file beside its images; written where that can be."""
    try:
        if look_at(job.folder, job.name).record is not None:
            return read_arrays(job.folder, job.name)
    except (FileNotFoundError, StoreError):
        pass  # no whole file from an earlier try
    arrays = joined([extract(images) for images in job.part.batches()])
    try:
        write_job(job.folder, job.name, pack(**arrays))
    except (OSError, StoreError) as error:
        logger.info("features of %s are not kept: %s", job.part.place.uri, error)
    return arrays


def sample_into(
    folder: Path, cascade: Cascade, *, count: int, captions: Sequence[str], seed: int
) -> Iterator[tuple[int, int]]:
    """Samples images of the captions or else of the classes in turn, as PNG files named by number.
    Yields images done and their total. Raises ValueError, in one line, for a folder that holds something, or a model
    that takes no such caption."""
    refuse(folder.exists() and any(folder.iterdir()), f"{folder} holds files: name a new folder for the samples")
    bare = cascade.with_generator(Request())
    asked = [bare.replace(prompt=caption) for caption in captions]
    asked = asked or [bare.replace(label=label) for label in range(len(cascade.classes(str(bare.generator))))] or [bare]
    requests = [asked[number % len(asked)].replace(seed=seed + number) for number in range(count)]
    cascade.resolve_all(requests)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(requests), cascade.most_at_once):
        for number, image in enumerate(cascade.sample(requests[start : start + cascade.most_at_once]), start):
            (folder / f"{number:06d}.png").write_bytes(encode_png(image))
            yield number + 1, len(requests)


def evaluate_given(
    images: str,
    reference: str,
    config: MeasureConfig,
    *,
    captions: Sequence[str] = (),
    clip: ClipScore | None = None,
    samples: Iterable[tuple[int, int]] = (),
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Every figure that the network has of the images against a reference, with N and the weights' sha256.
    `images`, `reference`: URIs as in the text of the module. `captions`: of the images in their order, for `clip`; of
    samples in turn. `samples`: makes the images, as `sample_into`, once reference and weights are read. `progress`:
    called with images done and their total. Raises ValueError, SourceError, ShardError or FeatureNetworkError, in one
    line."""
    published = published_gaussian(reference) if config.feature_network == "inception" else None
    real, extract = given_images(reference, needed=published is None), extractor_of(config)
    facts = config.facts(extract.sha256)
    for so_far in samples:
        progress(*so_far)
    made, found, done = given_images(images), [], 0
    count = sum(part.num_images for part in made)
    fault = clip is not None and not samples and len(captions) != count
    refuse(fault, f"{len(captions)} captions for {count} images: give each image a line, in the order of the names")
    for part in (*made, *real):
        found.append(measured_features(feature_job(part, *facts), extract))
        progress(done := done + part.num_images, sum(each.num_images for each in (*made, *real)))
    arrays = joined(found[: len(made)])
    references = joined(found[len(made) :]).get(FEATURES, np.zeros((0, 1)))
    gaussian = gaussian_of(references) if published is None else published
    compared = Compared(arrays[FEATURES], references, gaussian, seed=config.seed, logits=arrays.get(LOGITS))
    row, scores, own = measured_row("images", "model", compared, tuple(METRICS)), [], cycle(captions)
    if clip is not None:
        for batch in (batch for part in made for batch in part.batches()):
            scores.append(clip(batch, [next(own) for _ in batch]))
    clip_score = {f"clip_score_{counted(count)}": float(np.concatenate(scores).mean())} if scores else {}
    return {
        "images": images,
        "samples": row.samples,
        "reference": reference,
        "reference_samples": len(references) or None,
        "published_statistics": published is not None,
        "feature_network": config.feature_network,
        "feature_weights": config.feature_weights,
        "sha256_of_weights": facts[2] if len(facts) > 2 else None,
        "seed": config.seed,
        "figures": row.published(config.feature_network) | clip_score,
        "standard_error_of_distance": row.standard_error,
        "sha256_of_clip_weights": None if clip is None else clip.sha256,
    }
