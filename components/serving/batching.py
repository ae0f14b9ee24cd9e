"""The one thread of a replica that samples: images of several jobs together, where they agree on everything but what
they show.

`serve.batch` of Ray Serve does something else. It cuts batches by the clock, so that a lone image waits for company and
a late one misses it by a moment; it can't hold back those whose sampling options or version of the model differ, which
no batch may mix; and of a batch it moves all streams alike, where here one job wants previews and another none, one
goes away and another stays. Here nothing waits for company: while a batch is sampled the next one gathers.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from components.sampling.generator import OnStep
from components.sampling.image_files import encode_png
from components.sampling.images import to_uint8
from components.sampling.model import most_at_once
from components.sampling.requests import Request
from components.serving.measures import Measures
from components.serving.messages import FinishedImage, ImageJob, Partial
from components.serving.previews import Shown, shown_steps, steps_of
from components.serving.versions import Version

LOG = logging.getLogger("cascade.serving")
Tell = Callable[[Partial | FinishedImage | Exception], object]  # what comes of a job; an exception is the last of it


class BusyError(Exception):
    """Too many images wait."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} images wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class FailedError(Exception):
    """The model could not make an image of a request that it should be able to meet."""


class _EndedError(Exception):
    """Nobody wants the batch any more."""


@dataclass(eq=False)
class Ticket:
    """A job that was taken: where its events go, and whether somebody still wants them."""

    tell: Tell
    version: Version
    left: bool = False


@dataclass(eq=False)
class WaitingImage:
    """One image of a job."""

    ticket: Ticket
    place: int  # in the job
    request: Request  # with its generator named
    shown: Shown
    alone: bool = False  # a batch with it failed: it may be the reason

    def joins(self, oldest: "WaitingImage") -> bool:
        """Whether it can be in the batch of the image that waits longest."""
        if self is oldest:
            return True
        return (
            not (self.alone or oldest.alone)
            and self.ticket.version is oldest.ticket.version
            and self.request.sampling_options() == oldest.request.sampling_options()
        )


class Batcher:
    """Takes jobs from any thread; tells what comes of them from its own.

    Args:
        waiting_images: as many may wait; those of the batch that is sampled don't.
        batch_images: of one batch at most; fewer where images are large.
        threads: torch's, of the sampling; None: as many as it chooses.
    """

    def __init__(
        self, *, waiting_images: int, batch_images: int, measures: Measures, threads: int | None = None
    ) -> None:
        self._waiting_images, self._batch_images, self._threads = waiting_images, batch_images, threads
        self._measures = measures
        self._waiting: list[WaitingImage] = []
        self._changed = threading.Condition()
        self._closed = False
        self._batch_seconds = 0.0  # of the last one
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def add(self, job: ImageJob, version: Version, tell: Tell) -> Ticket:
        """Take a checked job whose images the version is to make. Raises BusyError if too many images wait."""
        ticket, images = Ticket(tell, version), []
        for place, request in enumerate(map(version.cascade.with_generator, job.requests)):
            steps = steps_of(version.cascade.makers[str(request.generator)], request) if job.partial_images else {}
            images.append(WaitingImage(ticket, place, request, shown_steps(steps, job.partial_images)))
        with self._changed:
            waiting = len(self._waiting)
            # A job of more images than may wait is taken where none waits: it would be refused forever.
            if waiting and waiting + len(images) > self._waiting_images:
                batches = math.ceil(waiting / self._batch_images)
                raise BusyError(waiting, max(1, math.ceil(batches * self._batch_seconds)))
            self._change(self._waiting + images)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the job any more: its images don't wait, and a batch of nothing else ends between two steps."""
        ticket.left = True
        with self._changed:
            self._change([image for image in self._waiting if image.ticket is not ticket])

    def close(self) -> None:
        """Sample no more; the thread ends between two steps."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def works(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def report(self) -> None:
        """Say again how many images wait: Ray exports no gauge that was last set more than 20 s ago."""
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
            except _EndedError:
                pass
            except Exception as error:
                self._failed(batch, error)
            self._batch_seconds = time.monotonic() - started

    def _next_batch(self) -> list[WaitingImage]:
        """The image that waits longest, with those that can join it; [] at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            oldest = self._waiting[0]
            most = most_together(self._batch_images, oldest)
            batch = [image for image in self._waiting if image.joins(oldest)][:most]
            self._change([image for image in self._waiting if image not in batch])
            return batch

    def _sample(self, batch: Sequence[WaitingImage]) -> None:
        version, tags = batch[0].ticket.version, {"generator": str(batch[0].request.generator)}
        self._measures.batch.observe(len(batch), tags)
        began = False

        def between() -> None:
            nonlocal began
            if began:  # it is called once before the first step
                self._measures.steps.inc(len(batch), tags)
            began = True
            if self._closed or all(image.ticket.left for image in batch):
                raise _EndedError

        finished = version.cascade.sample_stages(
            [image.request for image in batch], batch_size=len(batch), on_step=on_step_of(batch), between=between
        )
        self._measures.images.inc(len(batch), tags)
        for image, stages in zip(batch, finished, strict=True):
            if not image.ticket.left:
                png = version.png(list(stages.values())[-1], image.request)
                image.ticket.tell(FinishedImage(image.place, png, version.number))

    def _failed(self, batch: Sequence[WaitingImage], error: Exception) -> None:
        """Sampling raised, though the requests were checked: of several images each is tried alone, and goes first."""
        if len(batch) > 1:
            LOG.warning("a batch of %s images failed (%s): each is tried alone", len(batch), type(error).__name__)
            again = [image for image in batch if not image.ticket.left]
            for image in again:
                image.alone = True
            with self._changed:
                self._change(again + self._waiting)
            return
        LOG.error("an image failed", exc_info=error)
        self.cancel(batch[0].ticket)
        batch[0].ticket.tell(FailedError("the model failed to make this image"))


def most_together(batch_images: int, oldest: WaitingImage) -> int:
    """Images of a batch: no more than the cascade's networks, and the size that is asked for, leave memory for."""
    most = min(batch_images, oldest.ticket.version.cascade.most_at_once)
    return most if oldest.request.size is None else min(most, most_at_once(max(oldest.request.size)))


def on_step_of(batch: Sequence[WaitingImage]) -> OnStep | None:
    """Tells the previews of those that want some; None where nobody does, which costs nothing."""
    if not any(image.shown for image in batch):
        return None

    def on_step(stage: str, step: int, time: float, x_t: Any, x_0: torch.Tensor) -> None:
        del time, x_t
        now = (stage, step + 1)
        rows = [row for row, image in enumerate(batch) if now in image.shown and not image.ticket.left]
        for row, pixels in zip(rows, to_uint8(x_0[rows]) if rows else (), strict=True):
            image = batch[row]
            image.ticket.tell(Partial(image.place, image.shown[now], *now, encode_png(pixels)))

    return on_step
