"""The service on Ray Serve: an API in front of each model's replicas; start and end.

The API's process imports neither torch nor MLflow, so the replicas' module is imported where they are described.
"""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from components.configuration.usage import UsageError
from components.serving.app import build_app
from components.serving.keys import Rates
from components.serving.messages import Card, Event, ImageJob, Taken, Unavailable
from components.serving.settings import ServedModel, ServiceSettings

LOG = logging.getLogger("cascade.serving")
APPLICATION = "image-cascade"
ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}
TAKE_SECONDS = 30.0  # for a replica to take a job: it is there and says so at once, or it is being started
LOST = (RayActorError, ReplicaUnavailableError)  # the replica's process is gone, or no replica any more
TRIES = 2
COUNT_SECONDS = 2.0
LOOKS = 10_000  # requests for health and the page, which never wait for a place
STARTS = 5  # of Ray's proxy, which gets a minute each
SLOW = "Ray's proxy is slow to start beside other work"
CHECK_SECONDS, SILENT_SECONDS = 5, 60  # a busy node answers late


class Api:
    """The deployment for HTTP, with a connection to each model. `read_keys`: gives the API keys here."""

    def __init__(
        self,
        settings: ServiceSettings,
        models: Mapping[str, DeploymentHandle],
        read_keys: Callable[[], Sequence[str]],
        rates: DeploymentHandle | None,
    ) -> None:
        self._settings, self._read_keys = settings, read_keys
        self._take_share = None if rates is None else partial(take_share, rates)
        self._backends = {name: RayBackend(handle) for name, handle in models.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._backends, self._settings, read_keys=self._read_keys, take_share=self._take_share)


async def take_share(rates: DeploymentHandle, key: str, images: int) -> float:
    """Takes images from a key's share, counted by `Rates` in one process for all processes for HTTP.
    Where nobody counts for a moment, nobody is refused for it."""
    try:
        return await asyncio.wait_for(rates.take.remote(key, images), COUNT_SECONDS)
    except (RayError, RayServeException, TimeoutError) as error:
        LOG.warning("images of keys are not counted now (%s)", type(error).__name__)
        return 0.0


class RayBackend:
    """A model in other processes."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)

    async def card(self) -> Card:
        """Returns the model's card. Raises Unavailable if no replica answers in time."""
        try:
            return await asyncio.wait_for(self._handle.card.remote(), TAKE_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable("the model can't be reached now; try again in a moment") from error

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        """Yields the events of a job; if its replica is lost before an event came, another gets the job, once.
        Raises Unavailable if no replica takes it in time, or the one that did is lost."""
        is_told = False
        for number in range(1, TRIES + 1):
            responses, seconds = self._streaming.make.remote(job), TAKE_SECONDS
            try:
                while True:
                    event, seconds = await asyncio.wait_for(anext(responses), seconds), None
                    if not isinstance(event, Taken):
                        is_told = True
                        yield event
            except StopAsyncIteration:
                return
            except LOST as error:
                LOG.warning("a replica was lost with a job (%s)", type(error).__name__)
                if is_told or number == TRIES:
                    raise Unavailable("the model was lost on the way; try again") from error
            except RayTaskError as error:
                raise Unavailable("the model failed to make this image; try again, or ask for another") from error
            except (RayError, RayServeException, TimeoutError) as error:
                raise Unavailable("the model can't be reached now; try again in a moment") from error
            finally:
                responses.cancel()  # nothing where it has ended


def service(settings: ServiceSettings, read_keys: Callable[[], Sequence[str]]) -> Application:
    """Returns the application for `serve.run` and `serve deploy`. `read_keys`: as `Api` takes it."""
    models = {model.name: model_application(model, settings) for model in settings.models}
    rates, minute = None, settings.limits.key_images_minute
    if minute is not None:
        rates = serve.deployment(Rates, name="Rates", ray_actor_options={"num_cpus": 0}).bind(minute)
    api = serve.deployment(
        name="Api",
        num_replicas=settings.api_replicas,
        ray_actor_options={"num_cpus": 0},
        # The API itself counts bodies and calls, and refuses.
        max_ongoing_requests=settings.calls + settings.limits.bodies + LOOKS,
        health_check_period_s=CHECK_SECONDS,
        health_check_timeout_s=SILENT_SECONDS,
        graceful_shutdown_timeout_s=settings.limits.seconds,  # as long as an answer may take
    )(serve.ingress()(Api))
    return api.bind(settings, models, read_keys, rates)


def model_application(model: ServedModel, settings: ServiceSettings) -> Application:
    """Returns the replicas of a model."""
    from components.serving.replica import Model

    scaling = None
    if settings.max_replicas > settings.min_replicas:
        scaling = AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.batch_images,  # more start another replica
        )
    deployment = serve.deployment(
        name=model.name.replace("/", "-").replace("#", "-"),  # Serve parts names by these
        num_replicas=settings.min_replicas if scaling is None else None,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=settings.replica_calls,
        health_check_period_s=CHECK_SECONDS,
        health_check_timeout_s=SILENT_SECONDS,
        graceful_shutdown_timeout_s=settings.limits.seconds,  # as long as an answer may take
    )(Model)
    return deployment.bind(model, settings)


def check_room(host: str, port: int) -> None:
    """Raises UsageError if this program's Ray has no room for a service at an address."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a bar shows what it says on its way
    before = serve.status()
    if APPLICATION in before.applications:
        raise UsageError("this cluster serves images already: end that service first, or take another cluster")
    if not before.proxies:
        check_port(host, port)
    elif not listens(host, port):
        raise UsageError(
            f"Ray Serve runs on this cluster already and does not listen at {host}:{port}: give its own address with "
            "--host and --port, or end it with `serve shutdown`"
        )


def run_service(
    settings: ServiceSettings,
    *,
    host: str,
    port: int,
    read_keys: Callable[[], Sequence[str]] = tuple,
    say: Callable[[str], object] = LOG.warning,
) -> None:
    """Starts the service, and returns when every model answers. `say`: for a line before a long wait."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a bar shows what it says on its way
    for left in reversed(range(STARTS)):
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
            application = service(settings, read_keys)
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config={"enable_access_log": False})
            return
        except (RayActorError, TimeoutError) as error:  # Serve itself ends a proxy that is slow to start
            if not left:
                raise UsageError(f"{SLOW}, and did not come: close other programs and start again") from error
            if left == STARTS - 1:
                say(f"{SLOW}: waiting for some minutes more")
        except RuntimeError as error:
            raise UsageError(reason_of_failure() or " ".join(str(error).split())) from error


def end_service() -> None:
    """Ends the service, and Ray Serve too without other users; the cluster stays."""
    if any(name != APPLICATION for name in serve.status().applications):
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Raises UsageError if no program may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does
            probe.bind((host, port))
    except OSError as error:
        reason = "another program listens there" if listens(host, port) else str(error.strerror)
        raise UsageError(f"can't listen at {host}:{port}, {reason}: choose another with --port") from error


def listens(host: str, port: int) -> bool:
    """Returns whether a program listens at an address."""
    try:
        socket.create_connection((ALL_ADDRESSES.get(host, host), port), timeout=2).close()
    except OSError:
        return False
    return True


def reason_of_failure() -> str | None:
    """Returns the last line of a failed part's traceback; None without a failure."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return None
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    reasons = re.findall(r"^\s*(?:[\w.]+Error|Unavailable): (.+)$", "\n".join(messages), re.MULTILINE)
    return reasons[-1] if reasons else None
