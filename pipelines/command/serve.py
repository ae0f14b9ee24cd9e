"""`cascade serve`: registered models over HTTP, on a private Ray or on a cluster."""

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console

import components
from components.configuration.usage import UsageError, usage_errors, validated
from components.runtime.tracking.names import REGISTRY, environment, shown_source
from components.serving.keys import KEYS, KEYS_FILE, read_keys
from components.serving.settings import ServedModel, ServiceSettings, is_loopback
from pipelines.command.options import SHARED_CORES
from pipelines.engine.session import on_cluster, set_environment, start_ray
from pipelines.planning.profiles import tracking_uri

if TYPE_CHECKING:
    from components.serving.deployment import Application

SERVING = {  # of the Ray that is started for a service
    "RAY_worker_niceness": "0",  # Ray's workers let all others go first; here somebody waits for them
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{components.__name__}.serving.middleware:middlewares",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # the proxy that has such callbacks
}
ON_THIS_MACHINE = SHARED_CORES | {
    "RAY_prestart_worker_first_driver": "0",  # else one starts for each logical CPU
}
START_SECONDS = 60
OF_SERVICE = "settings of the service: "


def build(args: dict[str, Any]) -> "Application":
    """Returns the service; the import_path of `serve deploy` and RayService is `….command.serve:build`.
    `args`: the fields of `ServiceSettings`; `tracking` may be left to MLFLOW_TRACKING_URI. Raises UsageError, in one
    line, for a field that does not fit."""
    from components.serving.deployment import service  # wrong use is said before torch is there

    set_environment(environment())
    fields = {"tracking": os.environ.get("MLFLOW_TRACKING_URI")} | args
    return service(validated(ServiceSettings, fields, OF_SERVICE), read_keys_here)


def read_keys_here() -> tuple[str, ...]:
    """Returns the API keys of this process's environment, which no other process is sent.
    Raises ValueError, in one line, for keys that can't be read."""
    return read_keys(os.environ)


def serve_models(
    models: Sequence[str], *, host: str, port: int, tracking: str | None, replicas: str, gpus: float | None, batch: int
) -> None:
    """Serves until SIGTERM or Ctrl-C; arguments are those of `cascade serve`.
    Raises UsageError, in one line, for a service that can't start."""
    end_by_signals()
    console = Console()
    if find_spec("fastapi") is None:
        raise UsageError("cascade serve needs the extra serve: pip install 'image-cascade[serve]'")
    set_environment(environment() | SERVING | ON_THIS_MACHINE)
    least, _, most = replicas.partition("..")
    if not least.isdecimal() or not (most or least).isdecimal():
        raise UsageError(f"--replicas {replicas}: write a number, or the least and the most such as 1..4")
    address = f"[{host}]" if ":" in host else host  # IPv6
    with usage_errors():
        keys, others = read_keys_here(), not is_loopback(address)
    if others and not keys:
        raise UsageError(f"--host {host} is reached by others: set {KEYS} (keys by commas) or {KEYS_FILE}")
    counts = {"min_replicas": int(least), "max_replicas": int(most or least), "batch_images": batch}
    asked = {"models": [served_model(text) for text in models], "tracking": tracking_uri(tracking)}
    asked |= counts | {"keys_required": others or bool(keys)}
    settings = validated(ServiceSettings, asked, OF_SERVICE)

    from components.serving.deployment import check_port, check_room, end_service, run_service
    from components.serving.versions import find_version

    with usage_errors():
        versions = [find_version(model.source, settings.tracking) for model in settings.models]
        if not on_cluster():
            check_port(host, port)
        with console.status("starting Ray"):
            cluster = start_ray(worker_start_timeout=START_SECONDS, verbose=False)
        end_by_signals()  # again: Ray has put its own in the place, which ends in a core dump
        each = float(cluster.gpus > 0) if gpus is None else gpus
        needed = each * settings.min_replicas * len(settings.models)
        if cluster.here and needed > cluster.gpus:  # an autoscaler may make more
            have = f"the replicas need {needed:g} GPUs together, this machine has {cluster.gpus:g}"
            raise UsageError(f"{have}: lower --replicas or --gpus")
        settings = settings.model_copy(update={"gpus": each})
        check_room(host, port)  # before what follows would end a service of somebody else
        try:
            with console.status(f"loading {', '.join(model.source for model in settings.models)}"):
                run_service(settings, host=host, port=port, read_keys=read_keys_here, say=console.print)
            for model, named in zip(settings.models, versions, strict=True):
                served = f"{model.name}: {shown_source(model.source)}, version {named.version}"
                console.print(f"http://{address}:{port} serves {served}", highlight=False, soft_wrap=True)
            threading.Event().wait()
        finally:  # with a Ray of its own at once; on a cluster, when who is answered has images
            # A second signal waits for nobody, and the cluster ends the service alone.
            ray.shutdown() if cluster.here else end_service()


def served_model(text: str) -> ServedModel:
    """Parses `NAME=SOURCE`, or a source that gives the name too. Raises UsageError."""
    name, equals, source = text.partition("=")
    if not equals or re.search("[/:]", name):  # part of an address
        source, name = text, shown_source(text).removeprefix(REGISTRY).partition("@")[0].partition("/")[0]
    if not (name and source):
        example = "models:/image-cascade-scenes@champion"
        raise UsageError(f"--model {text!r}: write SOURCE or NAME=SOURCE, such as {example}")
    return ServedModel(name=name, source=source)


def end_by_signals() -> None:
    """Makes SIGTERM and Ctrl-C end this program in order, with exit code 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *signaled: sys.exit(0))
