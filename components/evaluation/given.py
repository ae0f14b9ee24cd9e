"""Figures of given images against a reference, both as users have them (`data/given.py`).

A reference may be published statistics: an npz file with `mu` and `sigma`, beside images or alone, as the reference
sets of ADM (Dhariwal & Nichol, 2021). Those stand for the distance of `inception`, the network and protocol that they
are of. Features are computed in this process, and kept in a folder `features` beside the images, where that can be
written.
Shapes: N images, D features.
"""

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from components.data.given import NUMPY, given_images, open_archive
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
from components.evaluation.metrics import METRICS, Compared, Gaussian, gaussian_from, gaussian_of, measured_row
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
    facts, extract, found, done = config.facts(), extractor_of(config), [], 0
    for part in (*made, *real):
        found.append(measured_features(feature_job(part, *facts), extract))
        progress(done := done + part.num_images, sum(each.num_images for each in (*made, *real)))
    arrays = joined(found[: len(made)])
    references = joined(found[len(made) :]).get(FEATURES, np.zeros((0, 1)))
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
        "sha256_of_weights": facts[2] if len(facts) > 2 else None,
        "seed": config.seed,
        "figures": row.published(config.feature_network),
        "standard_error_of_distance": row.standard_error,
    }
