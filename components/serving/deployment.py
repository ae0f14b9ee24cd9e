"""The service as an application of Ray Serve: the API in front, a deployment of replicas for each model behind it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from components.serving.app import build_app
from components.serving.messages import Card, Event, Job, Taken, Unavailable
from components.serving.replica import Model
from components.serving.settings import ServedModel, ServiceSettings

LOG = logging.getLogger("cascade.serving")
ROOM_TO_REFUSE = 16  # calls more than a replica can take: it says itself that it is busy
TAKE_SECONDS = 30.0  # for a replica to take a job: it is there and says so at once, or it is being started
LOST = (RayActorError, ReplicaUnavailableError)  # the replica's process is gone, or no replica any more
TRIES = 2


class Api:
    """What Ray Serve runs for HTTP: no weights, and a connection to each model."""

    def __init__(self, settings: ServiceSettings, models: Mapping[str, DeploymentHandle]) -> None:
        self._settings = settings
        self._backends = {name: RayBackend(handle, seconds=settings.limits.seconds) for name, handle in models.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._backends, self._settings)


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

    async def make(self, job: Job) -> AsyncGenerator[Event]:
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

    async def _of_one_replica(self, job: Job) -> AsyncGenerator[Event]:
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


def service(settings: ServiceSettings) -> Application:
    """The application that `serve.run` and `serve deploy` take."""
    models = {model.name: model_application(model, settings) for model in settings.models}
    calls = settings.max_replicas * most_calls(settings) * len(models)
    api = serve.deployment(
        name="Api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=calls, health_check_period_s=5
    )(serve.ingress()(Api))
    return api.bind(settings, models)


def model_application(model: ServedModel, settings: ServiceSettings) -> Application:
    """The replicas of one model."""
    replicas: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
        # More jobs than one batch holds: another replica would start on them at once.
        replicas = {"autoscaling_config": scaling | {"target_ongoing_requests": settings.batch_images}}
    deployment = serve.deployment(
        name=model.name.replace("/", "-").replace("#", "-"),  # Serve parts names by these
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=most_calls(settings),
        health_check_period_s=5,
        health_check_timeout_s=60,  # a busy node answers late; the process itself is watched by Ray
        **replicas,
    )(Model)
    return deployment.bind(model, settings)


def most_calls(settings: ServiceSettings) -> int:
    """Jobs that a replica holds: Serve's own limit of 5 would leave no batch more than five of them."""
    return settings.limits.waiting_images + settings.batch_images + ROOM_TO_REFUSE
