"""Sampling both roads of a cascade for the report: what to ask for, asking for it in parallel, and what came.

Work is cut into jobs that each leave one npz file under a fixed name, so a stage that was killed makes no finished job
again. Pictures depend on their requests alone, so neither the cut nor the number of workers changes them.

Shapes: N pictures of a job, H W their pixels, F frames of a strip.
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from components.evaluation.image_sets import FileImages
from components.evaluation.measure import MadeStage
from components.pool import Pool, file_name
from components.sampling.cascade import Cascade, to_uint8
from components.sampling.device import best_device
from components.sampling.requests import Request
from components.storage.artifact import Artifact
from components.storage.store import Store

JOB_SIZE = 64  # pictures of one job, and of one batch


class SampleJob(NamedTuple):
    """Requests that one worker samples in one batch."""

    name: str  # of its file, without `.npz`
    requests: tuple[Request, ...]
    frames: int = 0  # of the denoising strip to keep of each picture


class SampledPictures(NamedTuple):
    """What a job made."""

    stages: dict[str, np.ndarray]  # stage -> (N, H, W, 3) uint8, in the order in which the road made them
    strips: dict[str, "Strip"]

    @property
    def finished(self) -> np.ndarray:
        return list(self.stages.values())[-1]


class Strip(NamedTuple):
    """How a diffusion stage came to its pictures."""

    x_t: np.ndarray  # (F, N, H, W, 3) uint8
    x_0: np.ndarray  # (F, N, H, W, 3) uint8: the clean picture that the model sees in x_t
    timesteps: np.ndarray  # (F,) noising steps, or the times of another process


def accepts(cascade: Cascade, request: Request) -> bool:
    """Whether the models of the request's road can be conditioned on it."""
    try:
        cascade.check(request)
    except ValueError:
        return False
    return True


def request_for(cascade: Cascade, request: Request) -> Request | None:
    """The request with as many of its conditions as the models of its road take; None if they take none of them."""
    for candidate in (request, request._replace(prompt=None), request._replace(label=None)):
        if accepts(cascade, candidate):
            return candidate
    bare = request._replace(label=None, prompt=None)
    return bare if accepts(cascade, bare) else None


def measured_requests(
    cascade: Cascade,
    road: str,
    *,
    labels: np.ndarray,
    captions: Sequence[str],
    pictures: Sequence[bytes] = (),
    count: int,
    seed: int,
) -> list[Request]:
    """Requests with the conditions of pictures drawn at random (not balanced) from a set: (N,) labels, N captions, and
    N condition pictures for a cascade that takes them.

    Two models that know the same conditions are then compared on the same distribution of them.
    """
    generator = np.random.default_rng(seed)
    rounds = max(1, -(-count // len(labels)))  # none are asked for where count is 0
    chosen = np.concatenate([generator.permutation(len(labels)) for _ in range(rounds)])[:count]
    asked = [
        Request(
            label=int(labels[row]),
            prompt=captions[row] or None,
            seed=seed + number,
            condition=pictures[row] if pictures else None,
            road=road,
        )
        for number, row in enumerate(chosen)
    ]
    return [found for request in asked if (found := request_for(cascade, request)) is not None]


def shown_requests(cascade: Cascade, requests: Sequence[Request], *, each: int, seed: int) -> list[Request]:
    """`each` pictures for each request that its road takes; the same seeds for all of them."""
    asked = [request._replace(seed=seed + number) for request in requests for number in range(each)]
    return [request for request in asked if accepts(cascade, request)]


def jobs_of(name: str, requests: Sequence[Request]) -> list[SampleJob]:
    """Requests cut into jobs called name-000, name-001, …"""
    starts = range(0, len(requests), JOB_SIZE)
    return [
        SampleJob(f"{name}-{number:03d}", tuple(requests[start : start + JOB_SIZE]))
        for number, start in enumerate(starts)
    ]


def sample_jobs(jobs: Sequence[SampleJob], cascade: Artifact, *, files: Store, pool: Pool) -> Iterator[SampleJob]:
    """Sample the jobs whose files are missing; yields each job once its file is there."""
    yield from pool.finish(partial(RoadSampler, cascade, files), jobs, files=files)


class RoadSampler:
    """One actor of the pool."""

    def __init__(self, cascade: Artifact, files: Store) -> None:
        with cascade.local_copy() as folder:
            self.cascade, self.files = Cascade.load(folder, device=best_device()), files

    def __call__(self, job: SampleJob) -> SampleJob:
        self.files.write(file_name(job.name), pack_job(sample_job(self.cascade, job)))
        return job


def sample_job(cascade: Cascade, job: SampleJob) -> SampledPictures:
    """Sample one job, with its strip if it asks for frames."""
    recorded: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {}

    def keep(stage: str, step: int, timestep: float, x_t: Tensor, x_0: Tensor) -> None:
        recorded.setdefault(stage, []).append((timestep, np.stack(to_uint8(x_t)), np.stack(to_uint8(x_0))))

    made = cascade.sample_stages(list(job.requests), batch_size=JOB_SIZE, on_step=keep if job.frames else None)
    stages = {stage: np.stack([pictures[stage] for pictures in made]) for stage in made[0]}
    return SampledPictures(stages, {stage: _strip(steps, job.frames) for stage, steps in recorded.items()})


def pack_job(made: SampledPictures) -> bytes:
    """As npz: `picture.STAGE`, and `x_t.STAGE`, `x_0.STAGE`, `timesteps.STAGE` of strips."""
    arrays: dict[str, Any] = {f"picture.{stage}": pictures for stage, pictures in made.stages.items()}
    for stage, strip in made.strips.items():
        arrays |= {f"{field}.{stage}": value for field, value in strip._asdict().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpack_job(data: bytes) -> SampledPictures:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        fields = [name.partition(".") for name in arrays]
        stages = {stage: arrays[f"picture.{stage}"] for field, _, stage in fields if field == "picture"}
        strips = {
            stage: Strip(*(arrays[f"{field}.{stage}"] for field in Strip._fields))
            for head, _, stage in fields
            if head == "x_t"
        }
        return SampledPictures(stages, strips)


def read_job(job: str, files: Store) -> SampledPictures:
    return unpack_job(files.read(file_name(job)))


def joined(parts: Sequence[SampledPictures]) -> SampledPictures:
    """The pictures of several jobs, one after another; without strips."""
    names = parts[0].stages if parts else {}
    return SampledPictures({stage: np.concatenate([part.stages[stage] for part in parts]) for stage in names}, {})


def measured_stages(samples: Artifact) -> list[MadeStage]:
    """The stages of each road with their files, from an artifact whose metadata lists the files of each road. Opens the
    files, so it runs in a worker."""
    found = []
    for road, files in samples.metadata["measured"].items():
        parts: dict[str, list[FileImages]] = {}
        sides: dict[str, int] = {}
        for file in files:
            entry = samples.entry(file)
            for stage, images in unpack_job(samples.read(file)).stages.items():
                part = FileImages(samples.store, entry.path, f"picture.{stage}", len(images), entry.digest)
                parts.setdefault(stage, []).append(part)
                sides[stage] = images.shape[1]
        found += [MadeStage(road, stage, sides[stage], tuple(own)) for stage, own in parts.items()]
    return found


def _strip(steps: Sequence[tuple[float, np.ndarray, np.ndarray]], frames: int) -> Strip:
    chosen = np.unique(np.linspace(0, len(steps) - 1, frames).round().astype(int))
    timesteps, x_t, x_0 = zip(*(steps[index] for index in chosen), strict=True)
    return Strip(np.stack(x_t), np.stack(x_0), np.array(timesteps))
