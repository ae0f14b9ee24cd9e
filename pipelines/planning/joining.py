"""Checks a Ray cluster before joining: a live head, a valid token, an equal version.

`ray.init` would find out as well, after half a minute or several, and its native code says so on stderr twenty times or
ends the process. So the cluster's head is asked first, by the two calls of its protocol that need nothing else.
"""

import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

import grpc
from ray.util import get_node_ip_address

from components.configuration.usage import UsageError
from components.runtime.ray_internals import gcs_pb2, gcs_service_pb2

ANSWER_SECONDS = 10.0  # a head that is just starting has so long to answer
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")
TOKEN_FILE = "~/.ray/auth_token"


def check_cluster(address: str) -> None:
    """Raise UsageError, in one line, if the cluster at `address` can't be joined from this machine.
    What is no host:port is left to `ray.init`: `auto` (a submitted job has it, and its token), `ray://…`."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "://" in address:
        return
    token, place = _token()
    head = f"{get_node_ip_address() if host in THIS_MACHINE else host}:{port}"  # as ray.init reads it
    try:
        with _channel(head) as channel:
            version = _answer(channel, "CheckAlive", token).ray_version
            nodes = _answer(channel, "GetAllNodeInfo", token).node_info_list
    except grpc.RpcError as error:
        raise UsageError(_refusal(address, error, place if token else None)) from error
    if version != (own := importlib.metadata.version("ray")):
        raise UsageError(
            f"the cluster at {address} is Ray {version}, this program runs on Ray {own}; run it in the cluster's own "
            f"image, or start a cluster of Ray {own}"
        )
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # programs join by the socket of their own node
    if not any(node.state == alive and Path(node.raylet_socket_name).exists() for node in nodes):
        raise UsageError(
            f"this machine is no node of the cluster at {address}; submit the program to it (`ray job submit -- python "
            "pipelines/full_cascade.py`), or run it on one of its nodes"
        )


def _token() -> tuple[str, str]:
    """Ray's token and its place, looked up in Ray's own order; "" without a token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "", ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    chosen = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path, place = Path(chosen or TOKEN_FILE).expanduser(), f"RAY_AUTH_TOKEN_PATH {chosen}" if chosen else TOKEN_FILE
    if not chosen and not path.is_file():
        return "", ""
    try:
        return path.read_text().strip(), place
    except OSError as error:
        raise UsageError(f"{place} can't be read ({error.strerror}); set RAY_AUTH_TOKEN") from error


def _channel(head: str) -> Any:
    options = (("grpc.enable_http_proxy", 0),)  # Ray's own connections pass by a proxy too
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(head, options)
    names = ("RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT", "RAY_TLS_CA_CERT")
    try:
        key, chain, root = (Path(os.environ[name]).read_bytes() for name in names)
    except (KeyError, OSError) as error:
        raise UsageError(f"RAY_USE_TLS needs the files of {', '.join(names)}: {error}") from error
    return grpc.secure_channel(head, grpc.ssl_channel_credentials(root, key, chain), options)


def _answer(channel: Any, call: str, token: str) -> Any:
    """The head's answer. Raises RpcError for none in time and for a refusal."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request, reply = (getattr(gcs_service_pb2, f"{call}{kind}") for kind in ("Request", "Reply"))
    ask = channel.unary_unary(
        f"/ray.rpc.NodeInfoGcsService/{call}",
        request_serializer=request.SerializeToString,
        response_deserializer=reply.FromString,
    )
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return ask(request(), timeout=max(1.0, deadline - time.monotonic()), metadata=metadata)
        except grpc.RpcError as error:
            if error.code() not in AWAY or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _refusal(address: str, error: Any, token_place: str | None) -> str:
    if error.code() != grpc.StatusCode.UNAUTHENTICATED:
        reason = " ".join(error.details().rpartition("last error: ")[2].split())[:200]
        return (
            f"no Ray cluster answers at {address} ({reason}); set RAY_ADDRESS to its head's host:port, or unset it to "
            "start Ray on this machine"
        )
    if token_place:
        return f"the cluster at {address} refuses the token of {token_place}; set RAY_AUTH_TOKEN to the cluster's own"
    return f"the cluster at {address} asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"
