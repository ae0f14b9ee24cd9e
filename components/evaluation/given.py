"""Figures of given images against a reference, both as users have them (`data/given.py`).

A reference may be published statistics: an npz file with `mu` and `sigma`, beside images or alone, as the reference
sets of ADM (Dhariwal & Nichol, 2021). Those stand for the distance of `inception`, the network and protocol that they
are of. Features are computed in this process, and kept in a folder `features` beside the images, where that can be
written.

Shapes: N images, D features.
"""

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from components.data.given import NUMPY, GivenImages, given_images, open_archive
from components.evaluation.features import (
    LOGITS,
    FeatureJob,
    MeasureConfig,
    extractor_of,
    feature_job,
    joined,
    measured_row,
    pack,
    read_arrays,
)
from components.evaluation.metrics import METRICS, Compared, Gaussian, gaussian_from, gaussian_of
from components.evaluation.networks import FEATURES
from components.runtime.pool import write_job
from components.runtime.storage.artifact import look_at
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import absolute

logger = logging.getLogger("cascade")


def published_gaussian(uri: str) -> Gaussian | None:
    """The Gaussian of `mu` and `sigma` of an npz file; None for anything else."""
    if not uri.endswith(NUMPY):
        return None
    with open_archive(absolute(uri)) as archive:
        if not {"mu.npy", "sigma.npy"} <= {*archive.namelist()}:
            return None
        mean, covariance = (np.load(io.BytesIO(archive.read(f"{n}.npy")), allow_pickle=False) for n in ("mu", "sigma"))
        return gaussian_from(mean, covariance)


class Measurer:
    """Features of parts of images, measured in this process or kept from an earlier try."""

    def __init__(self, config: MeasureConfig, *, total: int, progress: Callable[[int, int], None]) -> None:
        """`progress` is called with images done, and the `total`."""
        self.facts, self.extract = config.facts(), extractor_of(config)
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, parts: Sequence[GivenImages]) -> dict[str, np.ndarray]:
        """Arrays (N, ...) by name over all parts in order; empty without parts."""
        return joined([self.measure(feature_job(part, *self.facts)) for part in parts])

    def measure(self, job: FeatureJob) -> dict[str, np.ndarray]:
        """Arrays (n, ...) by name of a part, from the file beside its images where it is whole."""
        try:
            whole = look_at(job.folder, job.name).record is not None
        except (FileNotFoundError, StoreError):
            whole = False
        if whole:
            arrays = read_arrays(job.folder, job.name)
        else:
            arrays = joined([self.extract(images) for images in job.part.batches()])
            self.keep(job, arrays)
        self.done += job.part.num_images
        self.progress(self.done, self.total)
        return arrays

    def keep(self, job: FeatureJob, arrays: dict[str, np.ndarray]) -> None:
        """Write the file of a part where its folder can be written."""
        try:
            write_job(job.folder, job.name, pack(**arrays))
        except (OSError, StoreError) as error:
            logger.info("features of %s are not kept: %s", job.part.place.uri, error)


def evaluate_given(
    images: str, reference: str, config: MeasureConfig, *, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Every figure that the network has of the images against a reference, with N and the weights' sha256.

    Args:
        images, reference: URIs as in the text of the module.
        progress: called with images done and their total.

    Raises ValueError, SourceError, ShardError or FeatureNetworkError, in one line.
    """
    published = published_gaussian(reference) if config.feature_network == "inception" else None
    made, real = given_images(images), given_images(reference, needed=published is None)
    measure = Measurer(config, total=sum(part.num_images for part in [*made, *real]), progress=progress)
    arrays, references = measure(made), measure(real).get(FEATURES, np.zeros((0, 1)))
    gaussian = gaussian_of(references) if published is None else published
    compared = Compared(arrays[FEATURES], references, gaussian, seed=config.seed, logits=arrays.get(LOGITS))
    row = measured_row("images", "model", compared, tuple(METRICS))
    return {
        "images": images,
        "samples": row.samples,
        "reference": reference,
        "reference_samples": len(references) or None,
        "published_statistics": published is not None,
        "feature_network": config.feature_network,
        "feature_weights": config.feature_weights,
        "sha256_of_weights": measure.facts[2] if len(measure.facts) > 2 else None,
        "seed": config.seed,
        "figures": row.published(config.feature_network),
        "standard_error_of_distance": row.standard_error,
    }
