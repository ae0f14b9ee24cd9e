"""The service as an application of Ray Serve: the API in front, a deployment of replicas for each model behind it."""

from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from components.serving.ray_backend import Api
from components.serving.replica import Model
from components.serving.settings import ServedModel, ServiceSettings

LOOKS = 10_000  # requests more than are answered with images: none for health or the page ever waits for a place


def service(settings: ServiceSettings, read_keys: Callable[[], Sequence[str]]) -> Application:
    """The application that `serve.run` and `serve deploy` take.

    Args:
        read_keys: gives the API keys in the process that compares them.
    """
    models = {model.name: model_application(model, settings) for model in settings.models}
    room = settings.calls + settings.limits.bodies + LOOKS  # the API itself counts bodies and calls, and refuses
    api = serve.deployment(name="Api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=room, **life(settings))(
        serve.ingress()(Api)
    )
    return api.bind(settings, models, read_keys)


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
        max_ongoing_requests=settings.replica_calls,
        **life(settings),
        **replicas,
    )(Model)
    return deployment.bind(model, settings)


def life(settings: ServiceSettings) -> dict[str, float]:
    """How a replica is watched, and how long it may go on with what it has when it is to end."""
    return {
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,  # a busy node answers late; that a process is gone Ray sees by itself
        "graceful_shutdown_timeout_s": settings.limits.seconds,
    }
