"""A replica of a served model: jobs from arrival to last image, and the thread that samples.

Images of several jobs are sampled together, where they agree on everything but their content; while a batch is sampled
the next one gathers. Not `serve.batch` of Ray Serve: it cuts batches by the clock, can't hold back those whose sampling
options or version of the model differ, and moves all streams of a batch alike.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ray.util.metrics import Counter, Gauge, Histogram

from components.configuration.sampling import DiffusionSampling
from components.runtime.execution import Resources, node_threads
from components.sampling.device import best_device
from components.sampling.generator import Generator, Look, OnStep
from components.sampling.image_files import encode_png
from components.sampling.images import to_uint8
from components.sampling.model import most_at_once
from components.sampling.plan import Plan
from components.sampling.requests import Request, settings_of, with_settings
from components.serving.messages import NO_KEY, Card, Event, FinishedImage, ImageJob, Partial, Refused, Taken
from components.serving.settings import Limits, ServedModel, ServiceSettings
from components.serving.versions import EndedError, Version, Versions

LOG = logging.getLogger("cascade.serving")
SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250]
IMAGES = [1, 2, 4, 8, 16, 32, 64]
OK, WENT_AWAY, FAILED = 200, 499, 500
Tell = Callable[[Event], object]  # takes events; the last is an image or a refusal
Shown = dict[tuple[str, int], int]  # (stage, step from 1) -> number of the preview from 0


class Measures:
    """Counts of a replica, through Ray's metrics; Prometheus shows names that start with `ray_`."""

    def __init__(self, model: str) -> None:
        by_code, by_generator, words = ("model", "code"), ("model", "generator"), "Jobs that ended, by the code of HTTP"
        self.requests = Counter("cascade_serve_requests", words, (*by_code, "key"))
        self.images = Counter("cascade_serve_images", "Images that were made", (*by_generator, "key"))
        self.steps = Counter("cascade_serve_steps", "Denoising steps or tokens, times images", by_generator)
        self.seconds = Histogram("cascade_serve_request_seconds", "From arrival to end", SECONDS, by_code)
        self.batch = Histogram("cascade_serve_batch_images", "Images of a batch", IMAGES, by_generator)
        self.waiting = Gauge("cascade_serve_waiting_images", "Images that no batch has yet", ("model",))
        for metric in vars(self).values():
            metric.set_default_tags({"model": model})

    def ended(self, code: int, seconds: float, *, key: str) -> None:
        """Counts a job by the HTTP code of its end, and the name of its key; 499: the client went away."""
        self.requests.inc(1, {"code": str(code), "key": key})
        self.seconds.observe(seconds, {"code": str(code)})


@dataclass(eq=False)
class Ticket:
    """An accepted job: the target of events, the client's key, and whether somebody still listens."""

    tell: Tell
    version: Version
    key: str = NO_KEY
    left: bool = False


@dataclass(eq=False)
class WaitingImage:
    """An image of a job, waiting for a batch."""

    ticket: Ticket
    place: int  # in the job
    request: Request  # with its generator named
    plan: Plan
    shown: Shown
    alone: bool = False  # a batch with it failed: it may be the reason

    def joins(self, oldest: "WaitingImage") -> bool:
        """Returns whether the image can share the batch of the oldest waiting image."""
        is_alike = self.ticket.version is oldest.ticket.version and self.plan.way == oldest.plan.way
        return self is oldest or (is_alike and not self.alone and not oldest.alone)


class Batcher:
    """A queue of jobs for any thread, with a sampling thread of its own for the events.
    `limits`: of images that may wait, without those that are sampled. `batch_images`: of one batch at most; fewer
    where images are large. `threads`: torch's; None: as many as it chooses."""

    def __init__(self, *, limits: Limits, batch_images: int, measures: Measures, threads: int | None = None) -> None:
        self._limits, self._batch_images, self._threads = limits, batch_images, threads
        self._measures = measures
        self._turns: dict[str, int] = {}  # key -> number of the last batch that began with an image of it
        self._waiting: list[WaitingImage] = []
        self._changed = threading.Condition()
        self._closed = False
        self._batch_seconds = 0.0  # of the last one
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def add(self, job: ImageJob, plans: Sequence[Plan], version: Version, tell: Tell) -> Ticket | None:
        """Accepts a job's images for a version, or tells a refusal if too many images wait."""
        ticket, images, cascade = Ticket(tell, version, job.key), [], version.cascade
        for place, (request, plan) in enumerate(zip(job.requests, plans, strict=True)):
            steps = steps_of(cascade.makers[plan.generator], plan) if job.partial_images else {}
            shown = shown_steps(steps, job.partial_images)
            images.append(WaitingImage(ticket, place, cascade.with_generator(request), plan, shown))
        with self._changed:
            own = [image for image in self._waiting if image.ticket.key == job.key]
            bounds = [(len(self._waiting), self._limits.waiting_images, "images")]
            if job.key != NO_KEY:
                bounds.append((len(own), self._limits.key_waiting_images, "images of this key"))
            for waiting, most, what in bounds:
                # A job of more images than may wait is taken where none waits: it would be refused forever.
                if waiting and waiting + len(images) > most:
                    seconds = max(1, math.ceil(math.ceil(waiting / self._batch_images) * self._batch_seconds))
                    tell(Refused(429, f"{waiting} {what} wait already; try again in {seconds} s", seconds))
                    return None
            self._change(self._waiting + images)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops a job without listeners; a batch of dropped jobs alone ends between two steps."""
        ticket.left = True
        with self._changed:
            self._change([image for image in self._waiting if image.ticket is not ticket])

    def close(self) -> None:
        """Ends the thread between two steps."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def works(self) -> bool:
        """Tells whether the sampling thread is alive."""
        return self._thread.is_alive()

    def report(self) -> None:
        """Repeats the number of waiting images: Ray exports no gauge set more than 20 s ago."""
        with self._changed:
            self._measures.waiting.set(len(self._waiting))

    def _change(self, waiting: list[WaitingImage]) -> None:
        self._waiting = waiting
        self._measures.waiting.set(len(waiting))
        self._changed.notify_all()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # here, for OpenMP keeps the number by thread
        while batch := self._next_batch():
            started = time.monotonic()
            try:
                self._sample(batch)
            except EndedError:
                pass
            except Exception as error:
                self._failed(batch, error)
            self._batch_seconds = time.monotonic() - started

    def _next_batch(self) -> list[WaitingImage]:
        """Returns the next image with all images that can join; [] at the end.
        The next is the oldest of the key whose turn was longest ago: nobody waits for all images of another."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first = min(self._waiting, key=lambda image: self._turns.get(image.ticket.key, 0))
            self._turns[first.ticket.key] = max(self._turns.values(), default=0) + 1
            most = most_together(self._batch_images, first)
            batch = [first, *(each for each in self._waiting if each is not first and each.joins(first))][:most]
            self._change([image for image in self._waiting if image not in batch])
            return batch

    def _sample(self, batch: Sequence[WaitingImage]) -> None:
        version, tags = batch[0].ticket.version, {"generator": batch[0].plan.generator}
        self._measures.batch.observe(len(batch), tags)
        began = False

        def between() -> None:
            nonlocal began
            if began:  # it is called once before the first step
                self._measures.steps.inc(len(batch), tags)
            began = True
            if self._closed or all(image.ticket.left for image in batch):
                raise EndedError

        plans = [image.plan for image in batch]
        ((_, made),) = version.cascade.make(plans, batch_size=len(batch), on_step=on_step_of(batch), between=between)
        for image, pixels in zip(batch, list(made.values())[-1].cpu().numpy(), strict=True):
            self._measures.images.inc(1, {**tags, "key": image.ticket.key})
            if not image.ticket.left:
                settings = settings_of(image.request, model=version.named.name, version=version.named.version)
                png = with_settings(encode_png(pixels), settings)
                image.ticket.tell(FinishedImage(image.place, png, version.named.version))

    def _failed(self, batch: Sequence[WaitingImage], error: Exception) -> None:
        """Tries each image of a batch alone and first: sampling raised, though the requests were checked."""
        if len(batch) > 1:
            LOG.warning("a batch of %s images failed (%s): each is tried alone", len(batch), type(error).__name__)
            for image in batch:
                image.alone = True
            with self._changed:
                self._change([image for image in batch if not image.ticket.left] + self._waiting)
            return
        LOG.error("an image failed", exc_info=error)
        self.cancel(batch[0].ticket)
        words = "the model failed to make this image; try again, or ask for another"
        batch[0].ticket.tell(Refused(503, words, retry_after=1))


class Model:
    """The deployment of a model in a process; ready after a first image of every generator.
    Raises ValueError, in one line, if there is no such model or it makes no image."""

    def __init__(self, model: ServedModel, settings: ServiceSettings) -> None:
        threads = sampling_threads(settings)
        if threads is not None:
            torch.set_num_threads(threads)
        self._versions = Versions(model, tracking=settings.tracking, poll_seconds=settings.poll_seconds)
        self._measures = Measures(model.name)
        self._batcher = Batcher(
            limits=settings.limits, batch_images=settings.batch_images, measures=self._measures, threads=threads
        )

    async def card(self) -> Card:
        """Returns the card of the current version."""
        return self._versions.card

    async def make(self, job: ImageJob) -> AsyncGenerator[Taken | Event]:
        """Yields `Taken`, then the job's events. Closing the iterator, or canceling its task, cancels the job."""
        started, code, missing, ticket = time.monotonic(), WENT_AWAY, len(job.requests), None
        events = asyncio.Queue[Event]()
        tell = partial(asyncio.get_running_loop().call_soon_threadsafe, events.put_nowait)
        try:
            ticket = await self._accept(job, tell)
            yield Taken()
            while missing:
                event = await events.get()
                if isinstance(event, Refused):
                    code = event.status
                    yield event
                    return
                missing -= isinstance(event, FinishedImage)
                yield event
            code = OK
        except Exception:
            code = FAILED
            raise
        finally:
            if ticket is not None:
                self._batcher.cancel(ticket)
            self._measures.ended(code, time.monotonic() - started, key=job.key)

    async def check_health(self) -> None:
        """Raises RuntimeError where images can't be made any more; Ray Serve starts another replica then."""
        if not self._batcher.works:
            raise RuntimeError("the sampling thread has ended")
        self._batcher.report()
        # An error of CUDA is for the life of the process: every later call raises it again.
        await asyncio.to_thread(lambda: torch.ones(1, device=best_device()).item())

    def __del__(self) -> None:
        for part in ("_versions", "_batcher"):
            if part in self.__dict__:  # else the constructor failed
                self.__dict__[part].close()

    async def _accept(self, job: ImageJob, tell: Tell) -> Ticket | None:
        version = self._versions.current
        try:
            plans = await asyncio.to_thread(lambda: [version.cascade.resolve(request) for request in job.requests])
        except ValueError as error:
            tell(Refused(400, str(error)))
            return None
        return self._batcher.add(job, plans, version, tell)


def sampling_threads(settings: ServiceSettings) -> int | None:
    """Returns torch's threads: the replica's CPUs, or the node's for a single one; None on a GPU."""
    if settings.gpus:
        return None
    if len(settings.models) == settings.max_replicas == 1:
        return node_threads(Resources(threads=None))
    return max(1, int(settings.cpus))


def most_together(batch_images: int, oldest: WaitingImage) -> int:
    """Returns the largest number of images in a batch, by networks and image size."""
    most = min(batch_images, oldest.ticket.version.cascade.most_at_once)
    return most if oldest.plan.size is None else min(most, most_at_once(max(oldest.plan.size)))


def on_step_of(batch: Sequence[WaitingImage]) -> OnStep | None:
    """Returns a function that sends previews; None where no client wants previews, at no cost."""
    if not any(image.shown for image in batch):
        return None

    def on_step(stage: str, step: int, time: float, x_t: Look, x_0: Look) -> None:
        del time, x_t
        now = (stage, step + 1)
        rows = [row for row, image in enumerate(batch) if now in image.shown and not image.ticket.left]
        for row, pixels in zip(rows, to_uint8(x_0()[rows]) if rows else (), strict=True):
            image = batch[row]
            image.ticket.tell(Partial(image.place, image.shown[now], *now, encode_png(pixels)))

    return on_step


def shown_steps(steps: Mapping[str, int], previews: int) -> Shown:
    """Returns the steps of at most `previews` previews, spread over all but the last step, the image."""
    every = [(stage, step) for stage, count in steps.items() for step in range(1, count + 1)]
    places = {round((number + 1) * len(every) / (previews + 1)) for number in range(previews)}
    inside = sorted(place for place in places if 1 <= place < len(every))
    return {every[place - 1]: number for number, place in enumerate(inside)}


def steps_of(maker: Generator, plan: Plan) -> dict[str, int]:
    """Returns the denoising steps of each stage with previews, in the stages' order."""
    models = maker.models if maker.shows_steps else ()
    return {model.name: plan.of(model).steps_taken for model in models if isinstance(model.sampling, DiffusionSampling)}
