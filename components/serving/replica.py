"""One replica of a served model: its version, its batches, and jobs from their arrival to their last image."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import torch

from components.runtime.execution import Resources, node_threads
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.plan import Plan
from components.serving.batching import Batcher, BusyError, Measures
from components.serving.messages import Card, Event, FinishedImage, ImageJob, Partial, Refused, Taken
from components.serving.settings import ServedModel, ServiceSettings
from components.serving.versions import Versions

LOG = logging.getLogger("cascade.serving")
CODES = {"invalid": 400, "busy": 429, "late": 503}  # of HTTP, by the trouble
OK, WENT_AWAY, FAILED = 200, 499, 500


class Model:
    """The deployment of one model, in a process of its own; ready once every generator has made something.

    Raises ValueError, in one line, if there is no such model or it makes no image.
    """

    def __init__(self, model: ServedModel, settings: ServiceSettings) -> None:
        self._seconds, threads = settings.limits.seconds, sampling_threads(settings)
        if threads is not None:
            torch.set_num_threads(threads)
        self._versions = Versions(model, tracking=settings.tracking, poll_seconds=settings.poll_seconds)
        self._measures = Measures(model.name)
        self._batcher = Batcher(
            waiting_images=settings.limits.waiting_images,
            batch_images=settings.batch_images,
            measures=self._measures,
            threads=threads,
        )

    async def card(self) -> Card:
        """Returns the card of the version that answers now."""
        return self._versions.card

    async def make(self, job: ImageJob) -> AsyncGenerator[Taken | Event]:
        """Yields that the job is taken, then its events. Closing the iterator, or canceling its task, cancels the job.

        Raises FailedError for an image that could not be made, though its request was checked.
        """
        started, code = time.monotonic(), WENT_AWAY
        try:
            async with aclosing(self._events(job)) as events:
                async for event in events:
                    if isinstance(event, Refused):
                        code = CODES[event.trouble]
                    yield event
            code = OK if code == WENT_AWAY else code
        except Exception:
            code = FAILED
            raise
        finally:
            self._measures.ended(code, time.monotonic() - started)

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

    async def _events(self, job: ImageJob) -> AsyncGenerator[Taken | Event]:
        deadline, images = time.monotonic() + self._seconds, len(job.requests)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Partial | FinishedImage | Exception]()
        version = self._versions.current
        try:
            plans = await asyncio.to_thread(plans_of, version.cascade, job)
            tell = partial(loop.call_soon_threadsafe, queue.put_nowait)
            ticket = self._batcher.add(job, plans, version, tell)
        except ValueError as error:
            yield Refused("invalid", str(error))
            return
        except BusyError as error:
            yield Refused("busy", str(error), error.retry_after)
            return
        try:
            yield Taken()
            while images:
                try:
                    event = await asyncio.wait_for(queue.get(), deadline - time.monotonic())
                except TimeoutError:
                    limit = f"{self._seconds:g}"
                    yield Refused("late", f"the images were not made within {limit} s; ask for fewer images or steps")
                    return
                if isinstance(event, Exception):
                    raise event
                images -= isinstance(event, FinishedImage)
                yield event
        finally:
            self._batcher.cancel(ticket)


def plans_of(cascade: Cascade, job: ImageJob) -> list[Plan]:
    """Returns the plan of each image of a job. Raises ValueError, in one line, which names an image by its number."""
    plans = []
    for number, request in enumerate(job.requests, 1):
        try:
            plans.append(cascade.resolve(request))
        except ValueError as error:
            raise ValueError(f"image {number}: {error}" if number > 1 else str(error)) from None
    return plans


def sampling_threads(settings: ServiceSettings) -> int | None:
    """Returns torch's threads of a replica: its logical CPUs, or the node's for the only one; None on a GPU."""
    if settings.gpus:
        return None
    if len(settings.models) == settings.max_replicas == 1:
        return node_threads(Resources(threads=None))
    return max(1, int(settings.cpus))
