"""Samples of generators: requests, jobs at work, their files, and the seconds that they take.

Each job leaves one npz file under a fixed name, so a stage that was killed makes no finished job again. Images depend
on their requests alone, so neither the cut nor the number of workers changes them. A worker samples a job in the
largest batches that fit on its device; the file is packed and written while the device is at the next job. It holds at
most two jobs (`components.runtime.pool.IN_HAND`), so the images in memory don't grow with the number of requests.
Shapes: N images of a job, H W their pixels, F frames of a strip.
"""

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.evaluation.image_sets import FileImages, MadeStage
from components.runtime.pool import Later, file_name, write_job
from components.runtime.storage.artifact import Artifact, Record
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade, quick
from components.sampling.device import Room, best_device
from components.sampling.generator import Look
from components.sampling.images import to_uint8
from components.sampling.requests import Request

JOB_SIZE = 64  # images of one job, at least
LARGEST_JOB = 512  # images of a job, at most, for many thousand requests
ENOUGH_JOBS = 64  # jobs of one generator, enough for as many workers


class SampleJob(NamedTuple):
    """Requests for a single worker to sample."""

    name: str  # of its file, without `.npz`
    requests: tuple[Request, ...]
    frames: int = 0  # of the denoising strip to keep of each image
    variant: Any = None  # the way of a study to sample, as the study understands it


class Strip(NamedTuple):
    """Denoising of a diffusion stage in F frames: noisy images, predicted clean images, and timesteps."""

    x_t: np.ndarray  # (F, N, H, W, 3) uint8
    x_0: np.ndarray  # (F, N, H, W, 3) uint8: the clean image that the model predicts from x_t
    timesteps: np.ndarray  # (F,) noising steps, or the times of another process


class SampledImages(NamedTuple):
    """Images of a finished job, by stage, with the denoising strips of diffusion stages."""

    stages: dict[str, np.ndarray]  # stage -> (N, H, W, 3) uint8, in order
    strips: dict[str, Strip]

    @property
    def finished(self) -> np.ndarray:
        """Images of the last stage, (N, H, W, 3) uint8."""
        return list(self.stages.values())[-1]


def load_cascade(cascade: Artifact, *, device: str | torch.device = "cpu") -> Cascade:
    """Loads a composed cascade from storage. Raises as `Cascade.load`."""
    with cascade.local_copy() as folder:
        return Cascade.load(folder, device=device)


def accepts(cascade: Cascade, request: Request) -> bool:
    """True if the models of the request's generator can be conditioned on the request."""
    try:
        cascade.resolve(request)
    except ValueError:
        return False
    return True


def request_for(cascade: Cascade, request: Request) -> Request | None:
    """The request with the conditions that the generator takes; None if the generator takes no condition."""
    for left_out in ([], ["prompt"], ["label"], ["label", "prompt"]):
        fewer = request.replace(**dict.fromkeys(left_out))
        if accepts(cascade, fewer):
            return fewer
    return None


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
    models that know the same conditions are then compared on the same distribution of them."""
    numbers = np.random.default_rng(seed)
    rounds = max(1, -(-count // len(labels)))  # no request where count is 0
    orders = [numbers.permutation(len(labels)) for _ in range(rounds)]
    requests = []
    for number, row in enumerate(np.concatenate(orders)[:count]):
        condition = images[row] if images else None
        asked = Request(label=int(labels[row]), prompt=captions[row] or None, condition=condition)
        taken = request_for(cascade, asked.replace(seed=seed + number, generator=generator))
        requests += [] if taken is None else [taken]
    return requests


def jobs_of(name: str, requests: Sequence[Request], *, size: int = JOB_SIZE) -> list[SampleJob]:
    """Requests cut into jobs called name-000, name-001, …"""
    parts = (requests[start : start + size] for start in range(0, len(requests), size))
    return [SampleJob(f"{name}-{number:03d}", tuple(part)) for number, part in enumerate(parts)]


def measured_jobs(generator: str, requests: Sequence[Request]) -> list[SampleJob]:
    """Jobs of the measured requests, larger where there are many thousand requests.
    Jobs grow by JOB_SIZE at a time, up to LARGEST_JOB, as long as there are ENOUGH_JOBS: a GPU has room for larger
    batches than a processor has a use for."""
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


def read_jobs(jobs: Sequence[SampleJob], files: Store) -> SampledImages:
    """The images of finished jobs in order, at least one; with the strips of the last."""
    parts = [unpack_job(files.read(file_name(job.name))) for job in jobs]
    stages = {stage: np.concatenate([part.stages[stage] for part in parts]) for stage in parts[0].stages}
    return SampledImages(stages, parts[-1].strips)


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


class Clock:
    """Seconds of sampling: of a GPU's stream, or of all threads of the process without the work aside.
    Cores are shared with other processes, and their own time is not. Work aside counts until it has ended."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.besides, self.lock = device.type != "cpu", 0.0, threading.Lock()

    def now(self) -> Any:
        """Seconds of the process so far without the finished work aside, or an event on a GPU's stream."""
        if not self.on_gpu:
            return time.process_time() - self.besides
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, started: Any) -> Callable[[], float]:
        """Seconds from `started` to the call; the returned function waits for the GPU's stream."""
        ended = self.now()

        def seconds() -> float:
            if not self.on_gpu:
                return ended - started
            ended.synchronize()
            return started.elapsed_time(ended) / 1000

        return seconds

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the processor's seconds of the thread in the context off the clock."""
        started = time.thread_time()
        try:
            yield
        finally:
            with self.lock:
                self.besides += time.thread_time() - started


class Drawn(NamedTuple):
    """Images of a job, still on the device."""

    batches: list[tuple[list[int], dict[str, Tensor]]]  # places of requests, and the images of each stage
    strips: dict[str, Strip]

    def fetched(self) -> SampledImages:
        """The images in the order of the requests. Waits for the device."""
        order = np.argsort([place for batch, _ in self.batches for place in batch])
        parts: dict[str, list[np.ndarray]] = {}
        for _, made in self.batches:
            for stage, images in made.items():
                parts.setdefault(stage, []).append(images.cpu().numpy())
        return SampledImages({stage: np.concatenate(part)[order] for stage, part in parts.items()}, self.strips)


class CascadeSampler:
    """Pool worker that samples jobs.
    Images leave the device, are packed and written while the next ones are sampled."""

    def __init__(self, cascade: Artifact, files: Store) -> None:
        self.device, self.files = best_device(), files
        self.cascade = load_cascade(cascade, device=self.device)
        self.clock, self.rooms = Clock(self.device), dict[str, Room]()  # by generator

    def __call__(self, job: SampleJob) -> Later:
        room, started = self.room(job), self.clock.now()
        drawn = room.work(len(job.requests), partial(draw_job, self.cascade, job))
        return Later(partial(self.keep, job, drawn, self.clock.since(started)))

    def room(self, job: SampleJob) -> Room:
        """Batch size of the job's generator: on a GPU as large as the memory allows.
        On a processor the size is fixed, because another size would change the bits."""
        generator = str(self.cascade.with_generator(job.requests[0]).generator)
        on_cpu = self.device.type == "cpu"
        most = self.cascade.most_at_once if on_cpu else LARGEST_JOB
        room = self.rooms.setdefault(generator, Room(self.device, most))
        if not on_cpu:
            try_room(room, self.cascade, job)
        return room

    def keep(self, job: SampleJob, drawn: Drawn, seconds: Callable[[], float]) -> None:
        """Writes the images of a job and the record with the seconds of sampling."""
        with self.clock.aside():
            made = drawn.fetched()
            stages = {stage: images.shape[:2] for stage, images in made.stages.items()}
            write_job(self.files, job.name, pack_job(made), stages=stages, seconds=seconds())


def seconds_per_image(jobs: Sequence[SampleJob], records: Mapping[str, Record]) -> float:
    """Seconds for an image, over finished jobs: of processor cores, or of a GPU.
    At least a single job is needed, and all threads of a processor count together. Loading the models and packing the
    images are not counted, decoding and scaling to 8 bits is."""
    seconds = sum(records[job.name].facts["seconds"] for job in jobs)
    return seconds / sum(len(job.requests) for job in jobs)


def try_room(room: Room, cascade: Cascade, job: SampleJob) -> None:
    """Finds the batch size that fits a job larger than any before, with the fewest steps of every stage.
    Otherwise a last stage that has no room would cost all the steps of those before it. Models that take no fewer
    steps are not tried."""
    size = min(room.most, len(job.requests))
    if size > room.tried:
        room.tried = size
        tried = tuple(quick(cascade, request) for request in job.requests)
        if tried != job.requests:
            room.work(len(tried), partial(draw_job, cascade, job._replace(requests=tried, frames=0)))


def draw_job(cascade: Cascade, job: SampleJob, batch_size: int | None = None) -> Drawn:
    """Samples a job, with a strip where the job asks for frames."""
    recorded: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}

    def keep(stage: str, step: int, timestep: float, x_t: Look, x_0: Look) -> None:
        recorded.setdefault(stage, []).append((to_uint8(x_t()), to_uint8(x_0()), timestep))

    on_step = keep if job.frames else None
    plans, strips = cascade.resolve_all(job.requests), {}
    batches = list(cascade.make(plans, batch_size=batch_size, on_step=on_step))
    for stage, steps in recorded.items():
        chosen = np.unique(np.linspace(0, len(steps) - 1, job.frames).round().astype(int))
        columns = zip(*(steps[index] for index in chosen), strict=True)
        strips[stage] = Strip(*map(np.stack, columns))
    return Drawn(batches, strips)
