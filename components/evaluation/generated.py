"""Sampling both generators of a cascade for the report: what to ask for, asking for it in parallel, and what came.

Work is cut into jobs that each leave one npz file under a fixed name, so a stage that was killed makes no finished job
again. Images depend on their requests alone, so neither the cut nor the number of workers changes them.

Shapes: N images of a job, H W their pixels, F frames of a strip.
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from components.evaluation.image_sets import FileImages
from components.evaluation.measure import MadeStage
from components.pool import Pool, file_name
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.images import to_uint8
from components.sampling.requests import Request
from components.storage.artifact import Artifact
from components.storage.store import Store

JOB_SIZE = 64  # images of one job, and of one batch


class SampleJob(NamedTuple):
    """Requests that one worker samples in one batch."""

    name: str  # of its file, without `.npz`
    requests: tuple[Request, ...]
    frames: int = 0  # of the denoising strip to keep of each image


class SampledImages(NamedTuple):
    """What a job made."""

    stages: dict[str, np.ndarray]  # stage -> (N, H, W, 3) uint8, in the order in which the generator made them
    strips: dict[str, "Strip"]

    @property
    def finished(self) -> np.ndarray:
        return list(self.stages.values())[-1]


class Strip(NamedTuple):
    """How a diffusion stage came to its images."""

    x_t: np.ndarray  # (F, N, H, W, 3) uint8
    x_0: np.ndarray  # (F, N, H, W, 3) uint8: the clean image that the model sees in x_t
    timesteps: np.ndarray  # (F,) noising steps, or the times of another process


def accepts(cascade: Cascade, request: Request) -> bool:
    """Whether the models of the request's generator can be conditioned on it."""
    try:
        cascade.check(request)
    except ValueError:
        return False
    return True


def request_for(cascade: Cascade, request: Request) -> Request | None:
    """The request with as many of its conditions as its generator takes; None if it takes none of them."""
    for candidate in (request, request._replace(prompt=None), request._replace(label=None)):
        if accepts(cascade, candidate):
            return candidate
    bare = request._replace(label=None, prompt=None)
    return bare if accepts(cascade, bare) else None


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
    """Requests with the conditions of images drawn at random (not balanced) from a set: (N,) labels, N captions, and
    N condition images for a cascade that takes them.

    Two models that know the same conditions are then compared on the same distribution of them.
    """
    numbers = np.random.default_rng(seed)
    rounds = max(1, -(-count // len(labels)))  # none are asked for where count is 0
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
    return [found for request in asked if (found := request_for(cascade, request)) is not None]


def shown_requests(cascade: Cascade, requests: Sequence[Request], *, each: int, seed: int) -> list[Request]:
    """`each` images for each request that its generator takes; the same seeds for all of them."""
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
    yield from pool.finish(partial(CascadeSampler, cascade, files), jobs, files=files)


class CascadeSampler:
    """One actor of the pool."""

    def __init__(self, cascade: Artifact, files: Store) -> None:
        with cascade.local_copy() as folder:
            self.cascade, self.files = Cascade.load(folder, device=best_device()), files
        # Cores are shared with other processes, and their own time is not; a GPU's time is on no core.
        self.clock = time.process_time if best_device().type == "cpu" else time.perf_counter

    def __call__(self, job: SampleJob) -> SampleJob:
        started = self.clock()
        made = sample_job(self.cascade, job)
        # In a file of its own: that of the images holds the same bytes whenever they are made.
        self.files.write(f"{job.name}.json", json.dumps({"seconds": self.clock() - started}).encode())
        self.files.write(file_name(job.name), pack_job(made))
        return job


def seconds_per_image(jobs: Sequence[SampleJob], files: Store) -> float:
    """Of finished jobs, one at least: seconds of a processor's cores, all threads together, or of a GPU, for an image.
    Loading the models is not counted, decoding and scaling to 8 bits is."""
    seconds = [json.loads(files.read(f"{job.name}.json"))["seconds"] for job in jobs]
    return sum(seconds) / sum(len(job.requests) for job in jobs)


def sample_job(cascade: Cascade, job: SampleJob) -> SampledImages:
    """Sample one job, with its strip if it asks for frames."""
    recorded: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {}

    def keep(stage: str, step: int, timestep: float, x_t: Tensor, x_0: Tensor) -> None:
        recorded.setdefault(stage, []).append((timestep, to_uint8(x_t), to_uint8(x_0)))

    made = cascade.sample_stages(list(job.requests), batch_size=JOB_SIZE, on_step=keep if job.frames else None)
    stages = {stage: np.stack([images[stage] for images in made]) for stage in made[0]}
    return SampledImages(stages, {stage: _strip(steps, job.frames) for stage, steps in recorded.items()})


def pack_job(made: SampledImages) -> bytes:
    """As npz: `image.STAGE`, and `x_t.STAGE`, `x_0.STAGE`, `timesteps.STAGE` of strips."""
    arrays: dict[str, Any] = {f"image.{stage}": images for stage, images in made.stages.items()}
    for stage, strip in made.strips.items():
        arrays |= {f"{field}.{stage}": value for field, value in strip._asdict().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpack_job(data: bytes) -> SampledImages:
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
    return unpack_job(files.read(file_name(job)))


def joined(parts: Sequence[SampledImages]) -> SampledImages:
    """The images of several jobs, one after another; without strips."""
    names = parts[0].stages if parts else {}
    return SampledImages({stage: np.concatenate([part.stages[stage] for part in parts]) for stage in names}, {})


def measured_stages(samples: Artifact) -> list[MadeStage]:
    """The stages of each generator with their files, from an artifact whose metadata lists them. Opens the files, so it
    runs in a worker."""
    found = []
    for generator, files in samples.metadata["measured"].items():
        parts: dict[str, list[FileImages]] = {}
        sides: dict[str, int] = {}
        for file in files:
            entry = samples.entry(file)
            for stage, images in unpack_job(samples.read(file)).stages.items():
                part = FileImages(samples.store, entry.path, f"image.{stage}", len(images), entry.digest)
                parts.setdefault(stage, []).append(part)
                sides[stage] = images.shape[1]
        found += [MadeStage(generator, stage, sides[stage], tuple(own)) for stage, own in parts.items()]
    return found


def _strip(steps: Sequence[tuple[float, np.ndarray, np.ndarray]], frames: int) -> Strip:
    chosen = np.unique(np.linspace(0, len(steps) - 1, frames).round().astype(int))
    timesteps, x_t, x_0 = zip(*(steps[index] for index in chosen), strict=True)
    return Strip(np.stack(x_t), np.stack(x_0), np.array(timesteps))
