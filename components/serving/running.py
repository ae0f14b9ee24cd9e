"""The service on a Ray that this program has joined or started: begun and ended."""

import logging
import re
import socket
from collections.abc import Callable, Sequence

from ray import serve

from components.serving.deployment import service
from components.serving.settings import ServiceSettings

APPLICATION = "image-cascade"
ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class StartError(Exception):
    """The service can't be begun; the message is one line."""


def check_room(host: str, port: int) -> None:
    """Raises StartError if the Ray that this program has joined or started has no room for a service at an address."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it says on its way, a bar says
    before = serve.status()
    if APPLICATION in before.applications:
        raise StartError("this cluster serves images already: end that service first, or take another cluster")
    if not before.proxies:
        check_port(host, port)
    elif not listens(host, port):
        raise StartError(
            f"Ray Serve runs on this cluster already and does not listen at {host}:{port}: give its own address with "
            "--host and --port, or end it with `serve shutdown`"
        )


def run_service(
    settings: ServiceSettings, *, host: str, port: int, read_keys: Callable[[], Sequence[str]] = tuple
) -> None:
    """Serve where there is room for it, and return when every model answers.

    Args:
        read_keys: gives the API keys in the process that compares them; none where nothing is said.

    Raises StartError.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        application = service(settings, read_keys)
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config={"enable_access_log": False})
    except RuntimeError as error:
        raise StartError(reason_of_failure() or " ".join(str(error).split())) from error


def end_service() -> None:
    """End the service, and Ray Serve itself where nobody else uses it; the cluster stays."""
    if any(name != APPLICATION for name in serve.status().applications):
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Raises StartError if no program may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does
            probe.bind((host, port))
    except OSError as error:
        reason = "another program listens there" if listens(host, port) else str(error.strerror)
        raise StartError(f"can't listen at {host}:{port}, {reason}: choose another with --port") from error


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((ALL_ADDRESSES.get(host, host), port), timeout=2).close()
    except OSError:
        return False
    return True


def reason_of_failure() -> str | None:
    """What a part of the service said when it could not begin: the last line of its traceback."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return None
    said = "\n".join([application.message, *(each.message for each in application.deployments.values())])
    reasons = re.findall(r"^\s*(?:[\w.]+Error|Unavailable): (.+)$", said, re.MULTILINE)
    return reasons[-1] if reasons else None
