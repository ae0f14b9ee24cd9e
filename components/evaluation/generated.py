"""Samples of a cascade's generators for the report: requests, jobs, and the files of the jobs.

Each job leaves one npz file under a fixed name, so a stage that was killed makes no finished job again. Images depend
on their requests alone, so neither the cut nor the number of workers changes them.

Shapes: N images of a job, H W their pixels, F frames of a strip.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from components.evaluation.image_sets import FileImages, MadeStage
from components.runtime.pool import file_name
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.requests import Request

JOB_SIZE = 64  # images of one job, at least
LARGEST_JOB = 512  # images of a job, at most, for many thousand requests
ENOUGH_JOBS = 64  # jobs of one generator, enough for as many workers


class SampleJob(NamedTuple):
    """Requests for a single worker to sample."""

    name: str  # of its file, without `.npz`
    requests: tuple[Request, ...]
    frames: int = 0  # of the denoising strip to keep of each image


class Strip(NamedTuple):
    """Denoising of a diffusion stage in F frames: noisy images, predicted clean images, and timesteps."""

    x_t: np.ndarray  # (F, N, H, W, 3) uint8
    x_0: np.ndarray  # (F, N, H, W, 3) uint8: the clean image that the model predicts from x_t
    timesteps: np.ndarray  # (F,) noising steps, or the times of another process


class SampledImages(NamedTuple):
    """Images of a finished job, by stage, with the denoising strips of diffusion stages."""

    stages: dict[str, np.ndarray]  # stage -> (N, H, W, 3) uint8, in the order in which the generator made them
    strips: dict[str, Strip]

    @property
    def finished(self) -> np.ndarray:
        """Images of the last stage, (N, H, W, 3) uint8."""
        return list(self.stages.values())[-1]


def accepts(cascade: Cascade, request: Request) -> bool:
    """True if the models of the request's generator can be conditioned on the request."""
    try:
        cascade.resolve(request)
    except ValueError:
        return False
    return True


def request_for(cascade: Cascade, request: Request) -> Request | None:
    """The request with the conditions that the generator takes; None if the generator takes no condition."""
    fewer = (
        request,
        request.replace(prompt=None),
        request.replace(label=None),
        request.replace(label=None, prompt=None),
    )
    return next((candidate for candidate in fewer if accepts(cascade, candidate)), None)


def measured_requests(
    cascade: Cascade,
    generator: str,
    *,
    labels: np.ndarray,
    captions: Sequence[str],
    images: Sequence[bytes] = (),
    count: int,
    seed: int,
) -> list[Request]:
    """Requests with the conditions of images drawn at random from a set, without balancing.

    The set is given as (N,) labels, N captions, and N condition images for a cascade that takes condition images. Two
    models that know the same conditions are then compared on the same distribution of them.
    """
    numbers = np.random.default_rng(seed)
    rounds = max(1, -(-count // len(labels)))  # no request where count is 0
    chosen = np.concatenate([numbers.permutation(len(labels)) for _ in range(rounds)])[:count]
    asked = [
        Request(
            label=int(labels[row]),
            prompt=captions[row] or None,
            seed=seed + number,
            condition=images[row] if images else None,
            generator=generator,
        )
        for number, row in enumerate(chosen)
    ]
    return [taken for request in asked if (taken := request_for(cascade, request)) is not None]


def jobs_of(name: str, requests: Sequence[Request], *, size: int = JOB_SIZE) -> list[SampleJob]:
    """Requests cut into jobs called name-000, name-001, …"""
    starts = range(0, len(requests), size)
    return [SampleJob(f"{name}-{n:03d}", tuple(requests[start : start + size])) for n, start in enumerate(starts)]


def measured_jobs(generator: str, requests: Sequence[Request]) -> list[SampleJob]:
    """Jobs of the measured requests, larger where there are many thousand requests.

    Jobs grow by JOB_SIZE at a time, up to LARGEST_JOB, as long as there are ENOUGH_JOBS: a GPU has room for larger
    batches than a processor has a use for.
    """
    size = min(max(JOB_SIZE * (len(requests) // (JOB_SIZE * ENOUGH_JOBS)), JOB_SIZE), LARGEST_JOB)
    name = f"measured_{generator}"
    return jobs_of(name if size == JOB_SIZE else f"{name}_by_{size}", requests, size=size)


def pack_job(made: SampledImages) -> bytes:
    """Packs a job as npz: `image.STAGE`, and for strips `x_t.STAGE`, `x_0.STAGE`, `timesteps.STAGE`."""
    arrays: dict[str, Any] = {f"image.{stage}": images for stage, images in made.stages.items()}
    for stage, strip in made.strips.items():
        arrays |= {f"{field}.{stage}": value for field, value in strip._asdict().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpack_job(data: bytes) -> SampledImages:
    """Opens a job that `pack_job` packed; the order of the stages is kept."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        fields = [name.partition(".") for name in arrays]
        stages = {stage: arrays[f"image.{stage}"] for field, _, stage in fields if field == "image"}
        strips = {
            stage: Strip(*(arrays[f"{field}.{stage}"] for field in Strip._fields))
            for head, _, stage in fields
            if head == "x_t"
        }
        return SampledImages(stages, strips)


def read_job(job: str, files: Store) -> SampledImages:
    """Reads and opens the file of a finished job."""
    return unpack_job(files.read(file_name(job)))


def joined(parts: Sequence[SampledImages]) -> SampledImages:
    """The images of several jobs in order; without strips."""
    names = parts[0].stages if parts else {}
    return SampledImages({stage: np.concatenate([part.stages[stage] for part in parts]) for stage in names}, {})


def measured_stages(samples: Artifact) -> list[MadeStage]:
    """The stages of each generator with the names of files, from the metadata of an artifact of samples."""
    found = []
    for generator, files in samples.metadata["measured"].items():
        parts, sides = dict[str, list[FileImages]](), dict[str, int]()
        for file in files:
            entry = samples.entry(file)
            for stage, (count, sides[stage]) in samples.metadata["contents"][file].items():
                part = FileImages(samples.store, entry.path, f"image.{stage}", count, entry.digest)
                parts.setdefault(stage, []).append(part)
        found += [MadeStage(generator, stage, sides[stage], tuple(own)) for stage, own in parts.items()]
    return found
