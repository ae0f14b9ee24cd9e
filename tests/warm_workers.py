"""Ray's workers as forks of one process that has imported what they need: importing torch, Ray and this product costs
more than most tests do with it.

A raylet starts its workers by the interpreter of who started Ray, which is `warm/python` here. The first worker starts
a server with its environment (Ray reads its settings once, at import), which forks it and all others of that
environment, for other raylets of the session too, until its raylet ends, or all forks have, those of an ended job. Ray
knows a worker by the pid that it registers, so nothing else changes: each is a process of its own, with its own
environment, that can be killed. Clusters of tests to which code is shipped, or whose nodes share nothing, fork from a
process that has imported libraries alone. What has to start from nothing (the wheel, a copy without git) starts so.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

PYTHON, IMPORTED, FOLDER = "TESTS_PYTHON", "TESTS_IMPORTED", Path(__file__).resolve().with_name("warm")
WORKERS, OF_SETUP = "/ray/_private/workers", ("--serialized-runtime-env-context=", "--language=")
# Of one raylet, or set by Ray Train for its workers; read when a worker starts, or at each call. RAY_JOB_ID is not.
LATE = ("RAY_RAYLET_PID", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
IDLE = 30  # seconds without a fork, after which 350 MB of memory are given back
LIBRARIES = (
    *("torch._dynamo", "torch.distributed.fsdp", "ray.data", "ray.train.torch", "ray.serve", "mlflow", "s3fs"),
    *("ray.train.v2._internal.execution.worker_group", "scipy.linalg", "pyarrow.parquet", "fastapi"),
)
PRODUCT = (
    *("pytest", "pipelines.engine.execute", "pipelines.workflows", "tests.tiny_training", "tests.tiny_text_image"),
    *("tests.distributed.recording", "tests.image_sets"),
)


def warm_environment(imported: str = "product") -> dict[str, str]:
    """Environment of a program, a `ray start` too, whose Ray forks its workers from what has `imported` the product
    or `libraries` alone."""
    path = os.pathsep.join(part for part in (str(FOLDER), os.environ.get("PYTHONPATH")) if part)
    return {PYTHON: sys.executable, IMPORTED: imported, "PYTHONPATH": path}


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """A Ray that is started here in this context forks its workers."""
    os.environ[PYTHON] = sys.executable
    sys.executable = str(FOLDER / "python")
    try:
        yield
    finally:
        sys.executable = os.environ[PYTHON]


def start(arguments: list[str]) -> None:
    """What `warm/python` does: a worker is forked, all else is left to the interpreter."""
    real, given = os.environ[PYTHON], arguments
    if arguments and arguments[0].endswith(f"{WORKERS}/setup_worker.py"):  # sets what a job asks for, starts the next
        told = {option: next((a for a in arguments if a.startswith(option)), "") for option in OF_SETUP}
        context = json.loads(told[OF_SETUP[0]].removeprefix(OF_SETUP[0]) or "{}")
        variables = context.get("env_vars") or {}
        prefix = context.get("command_prefix") or []
        shipped = prefix[:1] + prefix[2:] == ["cd", "&&"]  # code, into whose folder a worker goes
        if (shipped or not prefix) and "$" not in "".join(variables.values()):
            if shipped:
                os.chdir(*shlex.split(prefix[1]))
            os.environ |= variables
            given = [argument for argument in arguments[1:] if argument not in told.values()]
    if not given or not given[0].endswith(f"{WORKERS}/default_worker.py"):
        os.execv(real, [real, *given])
    settings = sorted(
        pair for pair in os.environ.items() if pair[0].startswith(("RAY_", "PYTHON")) and pair[0] not in LATE
    )
    raylet = next(argument for argument in given if argument.startswith("--raylet-name=")).partition("=")[2]
    address = f"{os.path.dirname(raylet)}/warm-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            with open(f"{address}.log", "w") as log:
                command = [real, "-m", "tests.warm_workers", address]
                process = subprocess.Popen(
                    command, cwd=FOLDER.parents[1], stdin=log, stdout=log, stderr=log, start_new_session=True
                )
            while not os.path.exists(address):
                if process.poll() is not None:
                    os.execv(real, [real, *given])
                time.sleep(0.05)
    # One that was killed, or just ends, answers nothing.
    with socket.socket(socket.AF_UNIX) as server, contextlib.suppress(ConnectionError, FileNotFoundError):
        server.connect(address)
        told = json.dumps({"arguments": given, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(told).to_bytes(8)], [0, 1, 2])
        server.sendall(told)
        if server.recv(1):  # comes when it is forked
            return
    os.execv(real, [real, *given])


def drawn() -> bytes:
    """What a fork draws first from Ray's random numbers."""
    from ray import JobID, TaskID

    ends = os.pipe()
    if (child := os.fork()) == 0:
        os.write(ends[1], TaskID.for_fake_task(JobID.from_int(1)).binary())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(ends[0], 100)


def serve(address: str) -> None:
    """Forks workers until the raylet is gone, or for half a minute all forks are: an ended job's."""
    import gc
    import importlib
    import random
    import runpy
    import signal

    import ray.actor
    from ray import ActorClassID

    # Ray's C++ seeds its random numbers with the first; a seed before the fork would give all workers the same numbers.
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    product = os.environ.get(IMPORTED) != "libraries"
    for name in (*LIBRARIES, *(PRODUCT if product else ())):
        with contextlib.suppress(ImportError):  # some tests take packages away
            importlib.import_module(name)
    if not product:
        sys.path.pop(0)  # the checkout: a worker takes the code that was shipped to it
    ray.actor.ActorClassID = ActorClassID
    assert drawn() != drawn(), "an import has drawn from Ray's random numbers"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(1)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    raylet, left = f"/proc/{os.environ['RAY_RAYLET_PID']}", time.monotonic()
    forks = Path(f"/proc/self/task/{os.getpid()}/children")
    while os.path.exists(raylet) and time.monotonic() - left < IDLE:
        left = time.monotonic() if forks.read_text() else left
        with contextlib.suppress(TimeoutError):
            client, _ = listener.accept()
            client.settimeout(None)
            head, files, _, _ = socket.recv_fds(client, 8, 3)
            size, told = int.from_bytes(head), b""
            while len(told) < size:
                told += client.recv(size - len(told))
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
            client.sendall(b"1")
            client.close()
    else:
        Path(address).unlink(missing_ok=True)
        return
    listener.close()
    client.close()
    os.setpgid(0, 0)  # Ray ends the group of a worker that has ended
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    random.seed()
    worker = json.loads(told)
    os.chdir(worker["folder"])
    os.environ.clear()
    os.environ |= worker["environment"]
    sys.argv = worker["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1]) if __spec__ else start(sys.argv[1:])
