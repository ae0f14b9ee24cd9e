"""Starts Ray on this machine, or joins the cluster of the submitted program."""

import logging
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import retry, retry_if_exception_message, stop_after_attempt

from components.configuration.usage import UsageError
from components.runtime.storage import outages
from components.runtime.storage.store import ALONE
from components.runtime.tracking.names import environment
from pipelines.planning.profiles import Cluster, found_cluster, local_cpus, usable_gpus

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES as it is
}
LOCAL = {  # a laptop is not preempted, and every process that is not started saves seconds
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Train notices at its next look that its workers are done
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_worker_register_timeout_seconds": "600",  # a busy laptop, late for Ray's 60, would wait for ever
    # Training frees and takes the same tens of megabytes at each step: glibc keeps them, where it would give them back
    # and have 20,000 page faults a step, and asks for huge pages, which halves the time of evaluation's small batches.
    "GLIBC_TUNABLES": (
        f"glibc.malloc.trim_threshold={2**30}:glibc.malloc.mmap_threshold={2**25}:glibc.malloc.hugetlb=1"
    ),
}
UNREAD = {  # else all logs are read ten times a second: 7 % of the CPU of short trainings
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "1e9",
}
# Parts of a page of Ray's memory killer: memory of the node, whom it killed, the largest processes.
FULL = re.compile(r"node running low on memory.*? was ([\d.]+GB) used / ([\d.]+GB) limit")
SELECTED = re.compile(r"Selected to kill: .*?task name=([^,]+),.*?pid=(\d+), actual memory used=([\d.]+GB)")
LARGE = re.compile(r"^(\d+)\t([\d.]+)\t(.+)$", re.MULTILINE)
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def start_ray(*, worker_start_timeout: int, verbose: bool, num_gpus: int | None = None) -> Cluster:
    """Join the cluster of `RAY_ADDRESS` or of the submitted job, else start Ray here.
    `num_gpus`: GPUs of a Ray that is started here; None: those that torch can use. Raises UsageError, in one line, if
    the cluster can't be joined or this machine is too busy to start Ray in time."""
    waiting = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(worker_start_timeout)}
    waiting |= {name: os.environ[name] for name in (outages.SETTING, ALONE) if name in os.environ}
    settings = ENVIRONMENT | environment() | waiting | ({} if on_cluster() else LOCAL if verbose else LOCAL | UNREAD)
    set_environment(settings)
    common: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if on_cluster():
        from pipelines.planning.joining import check_cluster  # no laptop needs its library

        check_cluster(os.environ.get("RAY_ADDRESS") or "auto")
        where: dict[str, Any] = {"address": "auto", "runtime_env": {"env_vars": settings}}
    else:
        _protect_token()
        gpus = usable_gpus() if num_gpus is None else num_gpus
        where = {"address": "local", "num_cpus": local_cpus(), "num_gpus": gpus, "include_dashboard": False}
    if not verbose:
        print_shortened()
    try:
        _init(**where, **common)
    except Exception as error:  # Ray raises plain ones, some of several lines
        does, again = "start here", "; the same command tries again"
        if on_cluster():
            does, again = f"join {os.environ.get('RAY_ADDRESS', 'the cluster')}", ""
        raise UsageError(f"Ray can't {does}: {' '.join(str(error).split())} Nothing was started{again}") from error
    return found_cluster(here=not on_cluster())


def memory_line(page: str) -> str:
    """A line for a page of Ray's memory killer, with a remedy; "" for any other text."""
    if (node := FULL.search(page)) is None:
        return ""
    killed = {pid: f"{name} (pid {pid}, {size})" for name, pid, size in SELECTED.findall(page)}
    others = [
        f"{command.strip()} (pid {pid}, {size}GB)" for pid, size, command in LARGE.findall(page) if pid not in killed
    ]
    close = f"close other programs (the largest: {others[0]})" if others else "close other programs"
    told = f"memory is full ({node[1]} of {node[2]}): Ray killed {', '.join(killed.values()) or 'a worker'}"
    return f"{told}; {close}, or set fewer num_workers and num_actors in the profile"


def print_shortened() -> None:
    """Has Ray print a line in place of each page of its memory killer to this terminal."""
    from components.runtime.ray_internals import ray_worker  # Ray Train takes seconds to import

    print_page = ray_worker.print_to_stdstream
    if print_page.__module__ == __name__:  # by an earlier run of this process
        return
    print_line: Callable[[dict[str, Any], bool], None] = lambda data, ignore_prefix: print_page(  # noqa: E731
        data | {"lines": [memory_line(str(line)) or line for line in data["lines"]]}, ignore_prefix
    )
    ray_worker.print_to_stdstream = print_line


@retry(retry=retry_if_exception_message(match=".*timed out during startup"), stop=stop_after_attempt(3), reraise=True)
def _init(**settings: Any) -> None:
    """Call `ray.init`, again after a start beyond Ray's 30 seconds, whose processes end here."""
    before = psutil.Process().children()
    try:
        ray.init(**settings)
    except Exception:
        for child in (started := [child for child in psutil.Process().children() if child not in before]):
            child.kill()
        psutil.wait_procs(started, timeout=10)
        raise


def this_node() -> NodeAffinitySchedulingStrategy:
    """Strategy of tasks and actors that stay on the node of the calling process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def set_environment(settings: dict[str, str]) -> None:
    """Set environment variables, except the user's own."""
    os.environ.update(settings | os.environ)


def on_cluster() -> bool:
    """True for a submitted job, and where RAY_ADDRESS names a cluster."""
    address = os.environ.get("RAY_ADDRESS", "")  # with http, jobs are submitted there
    return JOB_VARIABLE in os.environ or bool(address and not address.startswith("http"))


def _protect_token() -> None:
    """Write Ray's access token (256 random bits) for this user alone; Ray's own is readable for all.
    Raises UsageError, in one line, for a home that can't be written."""
    token = Path.home() / ".ray" / "auth_token"
    try:
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        token.chmod(0o600)
    except OSError as error:
        raise UsageError(f"Ray's access token can't be kept: {error}; set HOME to a folder of yours") from error
