"""Features of sets of images, measured part by part over all workers.

Each part leaves a file, so that a stage that was killed measures no finished part again. No process holds a set's
images, and the head not even the features of a set.

Shapes: N images of a set or a part, D features.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from components.evaluation.features import FeatureExtractor, FeatureNetwork, FeaturePrecision
from components.evaluation.image_sets import ImagePart, ImageSet, Purpose
from components.runtime.pool import Later, Pool, file_name, write_job
from components.runtime.storage.store import Store

FEATURES = "features"  # array of the files


class FeatureJob(NamedTuple):
    """A part of a set, measured by a single worker."""

    name: str  # of its file, without `.npz`
    part: ImagePart


class FeatureSet(NamedTuple):
    """A set of images as the names of feature files, in the order of the parts."""

    name: str
    purpose: Purpose
    files: tuple[str, ...]  # names of jobs


class FeatureMeasurer:
    """Pool worker that computes the features of a part and writes the file of features."""

    def __init__(self, network: FeatureNetwork, precision: FeaturePrecision, work: Store) -> None:
        self.features, self.work = FeatureExtractor(network, precision=precision), work

    def __call__(self, job: FeatureJob) -> Later:
        features = np.concatenate([self.features(images) for images in job.part.batches()])
        return Later(partial(write_job, self.work, job.name, pack(**{FEATURES: features})))


def measure_features(
    sets: Mapping[str, ImageSet],
    *,
    network: FeatureNetwork,
    precision: FeaturePrecision,
    work: Store,
    pool: Pool,
    progress: Callable[[int, int], None],
) -> list[FeatureSet]:
    """Measures each set of at least two images into files of `work`; finished files are kept.

    `progress` is called with images done and their total.
    """
    jobs = {
        name: [FeatureJob(f"features-{number:02d}-{count:05d}", part) for count, part in enumerate(images.parts)]
        for number, (name, images) in enumerate(sets.items())
        if images.num_images > 1
    }
    every, done = [job for group in jobs.values() for job in group], 0
    total = sum(job.part.num_images for job in every)
    for job in pool.finish(partial(FeatureMeasurer, network, precision, work), every, files=work):
        progress(done := done + job.part.num_images, total)
    return [FeatureSet(name, sets[name].purpose, tuple(job.name for job in group)) for name, group in jobs.items()]


def pack(**arrays: np.ndarray) -> bytes:
    """Packs arrays as npz without compression: features hardly get smaller."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyrefly: ignore[bad-argument-type]
    return buffer.getvalue()


def read_features(work: Store, files: Iterable[str]) -> np.ndarray:
    """The features (N, D) float32 of a set, part by part in order."""
    return np.concatenate([read_arrays(work, name)[FEATURES] for name in files])


def read_arrays(work: Store, job: str) -> dict[str, np.ndarray]:
    """All arrays of a finished job by name."""
    with np.load(io.BytesIO(work.read(file_name(job))), allow_pickle=False) as arrays:
        return dict(arrays)
