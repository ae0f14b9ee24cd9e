"""Sampling of jobs of requests in the largest batches that fit on a device, and the seconds taken.

The file of a job is packed, described and written while the device is at the next job.

A worker holds at most two jobs (`components.runtime.pool.IN_HAND`), so the images in memory don't grow with the number
of requests. Shapes: N images of a job, H W their pixels, F frames of a strip.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from components.evaluation.generated import LARGEST_JOB, SampledImages, SampleJob, Strip, pack_job
from components.runtime.pool import Later, Pool, write_job
from components.runtime.storage.artifact import Artifact, FileEntry, read_record
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade, quick
from components.sampling.device import Room, best_device
from components.sampling.images import to_uint8


class Clock(Protocol):
    """Clock of a device for the seconds of sampling, apart from other work in the process."""

    def now(self) -> Any:
        """A moment of the clock, for `since`."""

    def since(self, started: Any) -> Callable[[], float]:
        """Returns a function for the seconds between `started` and this call; it may wait for the device."""

    def aside(self) -> AbstractContextManager[None]:
        """Context for work of the thread that does not count."""


class ProcessorClock:
    """Seconds of all cores and threads of the process, without the work done aside.

    Cores are shared with other processes, and their own time is not. Work aside counts until it has ended.
    """

    def __init__(self) -> None:
        self.besides, self.lock = 0.0, threading.Lock()

    def now(self) -> float:
        """Seconds so far, without the finished work aside."""
        return time.process_time() - self.besides

    def since(self, started: float) -> Callable[[], float]:
        """Seconds from `started` to the call, fixed at the call."""
        return partial(float, self.now() - started)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the seconds of the thread in the context off the clock."""
        started = time.thread_time()
        try:
            yield
        finally:
            with self.lock:
                self.besides += time.thread_time() - started


class StreamClock:
    """Seconds of the current GPU between the work of two calls; a GPU's time is on no core.

    The time starts with what was asked of the GPU before the first call, and ends with what was asked before the
    second.
    """

    def now(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, started: torch.cuda.Event) -> Callable[[], float]:
        """Seconds of the GPU's stream from `started` to now; the returned function waits for the stream."""
        ended = self.now()

        def seconds() -> float:
            ended.synchronize()
            return started.elapsed_time(ended) / 1000

        return seconds

    def aside(self) -> AbstractContextManager[None]:
        """Counts nothing off: no work of the processor is on the GPU's stream."""
        return nullcontext()


class JobFile(NamedTuple):
    """Record of a job's file: manifest entry, stages, and seconds of sampling."""

    entry: FileEntry  # below the folder of the jobs
    stages: dict[str, tuple[int, int]]  # stage -> number of its images, and their side in pixels
    seconds: float  # of sampling the images


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

    Images leave the device, are packed and written while the next ones are sampled.
    """

    def __init__(self, cascade: Artifact, files: Store) -> None:
        self.device, self.files = best_device(), files
        with cascade.local_copy() as folder:
            self.cascade = Cascade.load(folder, device=self.device)
        self.clock: Clock = ProcessorClock() if self.device.type == "cpu" else StreamClock()
        self.rooms: dict[str, Room] = {}  # by generator

    def __call__(self, job: SampleJob) -> Later:
        room, started = self.room(job), self.clock.now()
        drawn = room.work(len(job.requests), partial(draw_job, self.cascade, job))
        return Later(partial(self.keep, job, drawn, self.clock.since(started)))

    def room(self, job: SampleJob) -> Room:
        """Batch size of the job's generator, with the room left on the device.

        On a processor the size is fixed, because another size would change the bits; on a GPU a batch is as large as
        the memory allows.
        """
        generator, on_cpu = str(self.cascade.with_generator(job.requests[0]).generator), self.device.type == "cpu"
        room = self.rooms.setdefault(generator, Room(self.device, self.cascade.most_at_once if on_cpu else LARGEST_JOB))
        if not on_cpu:
            try_room(room, self.cascade, job)
        return room

    def keep(self, job: SampleJob, drawn: Drawn, seconds: Callable[[], float]) -> None:
        """Writes the images of a job and the record with the seconds of sampling."""
        with self.clock.aside():
            made = drawn.fetched()
            stages = {stage: images.shape[:2] for stage, images in made.stages.items()}
            write_job(self.files, job.name, pack_job(made), stages=stages, seconds=seconds())


def sample_jobs(jobs: Sequence[SampleJob], cascade: Artifact, *, files: Store, pool: Pool) -> Iterator[SampleJob]:
    """Samples the jobs with missing files; yields each job when the file is written."""
    return pool.finish(partial(CascadeSampler, cascade, files), jobs, files=files)


def read_job_file(job: str, files: Store) -> JobFile:
    """Reads the record of a finished job; the file of images is not read."""
    record = read_record(files, job)
    (entry,), facts = record.files, record.facts
    return JobFile(entry, {stage: (count, side) for stage, (count, side) in facts["stages"].items()}, facts["seconds"])


def seconds_per_image(jobs: Sequence[SampleJob], records: Mapping[str, JobFile]) -> float:
    """Seconds for an image, over finished jobs: of processor cores, or of a GPU.

    At least a single job is needed, and all threads of a processor count together. Loading the models and packing the
    images are not counted, decoding and scaling to 8 bits is.
    """
    return sum(records[job.name].seconds for job in jobs) / sum(len(job.requests) for job in jobs)


def try_room(room: Room, cascade: Cascade, job: SampleJob) -> None:
    """Finds the batch size that fits, with the fewest steps of every stage.

    Tries only a job larger than any before: a last stage that has no room would cost all the steps of those before it.
    Models that take no fewer steps are not tried.
    """
    size = min(room.most, len(job.requests))
    if size <= room.tried:
        return
    room.tried = size
    tried = job._replace(requests=tuple(quick(cascade, request) for request in job.requests), frames=0)
    if tried.requests != job.requests:
        room.work(len(job.requests), partial(draw_job, cascade, tried))


def draw_job(cascade: Cascade, job: SampleJob, batch_size: int | None = None) -> Drawn:
    """Samples a job, with a strip where the job asks for frames."""
    recorded: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {}

    def keep(stage: str, step: int, timestep: float, x_t: Tensor, x_0: Tensor) -> None:
        """Keeps x_t and x_0 of a step for the strip of the stage."""
        recorded.setdefault(stage, []).append((timestep, to_uint8(x_t), to_uint8(x_0)))

    on_step = keep if job.frames else None
    batches, strips = list(cascade.make(cascade.resolve_all(job.requests), batch_size=batch_size, on_step=on_step)), {}
    for stage, steps in recorded.items():
        chosen = np.unique(np.linspace(0, len(steps) - 1, job.frames).round().astype(int))
        timesteps, x_t, x_0 = zip(*(steps[index] for index in chosen), strict=True)
        strips[stage] = Strip(np.stack(x_t), np.stack(x_0), np.array(timesteps))
    return Drawn(batches, strips)
