"""The API's process: HTTP on one side, models in other processes on the other. Imports nothing of MLflow."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from components.serving.app import build_app
from components.serving.messages import Card, Event, ImageJob, Taken, Unavailable
from components.serving.settings import ServiceSettings

LOG = logging.getLogger("cascade.serving")
TAKE_SECONDS = 30.0  # for a replica to take a job: it is there and says so at once, or it is being started
LOST = (RayActorError, ReplicaUnavailableError)  # the replica's process is gone, or no replica any more
TRIES = 2


class Api:
    """What Ray Serve runs for HTTP: no weights, and a connection to each model.

    Args:
        read_keys: gives the API keys in this process, so that no other is sent them. Raises ValueError.
    """

    def __init__(
        self, settings: ServiceSettings, models: Mapping[str, DeploymentHandle], read_keys: Callable[[], Sequence[str]]
    ) -> None:
        self._settings, self._read_keys = settings, read_keys
        self._backends = {name: RayBackend(handle, seconds=settings.limits.seconds) for name, handle in models.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._backends, self._settings, keys=self._read_keys())


class RayBackend:
    """A model in other processes.

    Args:
        seconds: that a replica gives a job.
    """

    def __init__(self, handle: DeploymentHandle, *, seconds: float) -> None:
        self._handle, self._streaming, self._seconds = handle, handle.options(stream=True), seconds

    async def card(self) -> Card:
        """Raises Unavailable if no replica says it in time."""
        try:
            return await asyncio.wait_for(self._handle.card.remote(), TAKE_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable("the model can't be reached now; try again in a moment") from error

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        """The events of a job. One whose replica was lost before it told anything is given to another, once.

        Raises Unavailable if no replica takes it in time, or the one that did is lost.
        """
        told = False
        for number in range(1, TRIES + 1):
            try:
                async with aclosing(self._of_one_replica(job)) as events:
                    async for event in events:
                        told = True
                        yield event
                return
            except LOST as error:
                LOG.warning("a replica was lost with a job (%s)", type(error).__name__)
                if told or number == TRIES:
                    raise Unavailable("the model was lost on the way; try again") from error
            except RayTaskError as error:
                raise Unavailable("the model failed to make this image; try again, or ask for another") from error
            except (RayError, RayServeException, TimeoutError) as error:
                raise Unavailable("the model can't be reached now; try again in a moment") from error

    async def _of_one_replica(self, job: ImageJob) -> AsyncGenerator[Event]:
        responses = self._streaming.make.remote(job)
        seconds = TAKE_SECONDS
        try:
            while True:
                try:
                    event = await asyncio.wait_for(anext(responses), seconds)
                except StopAsyncIteration:
                    return
                seconds = self._seconds + TAKE_SECONDS  # the replica keeps the time; it may be lost without a word
                if not isinstance(event, Taken):
                    yield event
        finally:
            responses.cancel()  # nothing where it has ended
