"""The service against `mlflow models serve`, and against the cascade called directly, on the same model and cores.

The cascade: a base of 16² (64 channels, 10 DDIM steps) and an upsampler to 32² (5 steps), random weights. Every client
asks for one image at a time, by label and seed; each side answers all clients of a round before the other does.
"""

import base64
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from components.runtime import events
from components.runtime.tracking.tracker import Tracker
from components.sampling.cascade import Cascade, compose
from components.sampling.requests import Request
from pipelines.command.options import SHARED_CORES
from tests.conftest import free_port, wait_for
from tests.tiny_cascade import CLASSES, DIFFUSION, UNET, UPSAMPLER, commit_model, write_model

NAME = "image-cascade-bench"
CLIENTS, IMAGES_EACH = (1, 4, 16), 3
PREVIEWS = 8
NETWORK = UNET | {"model_channels": 64, "num_res_blocks": 2, "attention_resolutions": [8], "head_dim": 32}
FEW = {"sampler": "ddim", "num_inference_steps": 10}
Ask = Callable[[int], None]  # for the image of a seed


def write_bench_cascade(folder: Path) -> Path:
    base = DIFFUSION | {"role": "base", "resolution": 16}
    upsampler = DIFFUSION | UPSAMPLER | {"resolution": 32, "low_res_resolution": 16}
    larger = NETWORK | {"resolution": 32, "low_res": True, "model_channels": 32}
    return compose(
        folder / "cascade",
        base=write_model(folder / "base", "unet", NETWORK | {"resolution": 16}, base),
        upsamplers={"upsampler_32": write_model(folder / "upsampler_32", "unet", larger, upsampler)},
        sampling={"base": FEW, "upsampler_32": FEW | {"num_inference_steps": 5, "noise_level": 5}},
    )


@contextmanager
def server(command: list[str], variables: dict[str, str], health: str, folder: Path) -> Iterator[psutil.Process]:
    """A server and all that it starts."""
    with open(folder / f"{Path(command[0]).name}.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(health, process)
        yield psutil.Process(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def register(folder: Path, home: Path) -> str:
    """Address of a registry that has the cascade as champion."""
    tracking = f"sqlite:///{home / 'mlflow.db'}"
    tracker = Tracker(tracking, experiment="bench", spool=home / "spool", flush_seconds=0.3)
    tracker.emit(events.RunStarted("run", "", {}, {"name": "bench"}))
    tracker.emit(events.StageCached("cascade", commit_model(home, "cascade", "k1", folder)))
    assert tracker.close("FINISHED") == []
    return tracking


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read()


def ask_ours(url: str) -> Ask:
    def ask(seed: int) -> None:
        body = {"prompt": "", "label": CLASSES[seed % len(CLASSES)], "seed": seed}
        answer = json.loads(post(f"{url}/v1/images/generations", body))
        assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")

    return ask


def ask_mlflow(url: str) -> Ask:
    def ask(seed: int) -> None:
        body = {"inputs": [{"label": CLASSES[seed % len(CLASSES)], "seed": seed}]}
        (image,) = json.loads(post(f"{url}/invocations", body))["predictions"]
        assert base64.b64decode(image).startswith(b"\x89PNG")

    return ask


def measure(ask: Ask, clients: int, process: psutil.Process) -> dict[str, Any]:
    """Seconds an image, CPU seconds an image, and the waits of all clients."""
    waits: list[float] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        for turn in range(IMAGES_EACH):
            started = time.perf_counter()
            ask(1000 * number + turn)
            with lock:
                waits.append(time.perf_counter() - started)

    cpu, started = cpu_seconds(process), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    wall = time.perf_counter() - started
    return {"wall": wall / len(waits), "cpu": (cpu_seconds(process) - cpu) / len(waits), "waits": waits}


def cpu_seconds(process: psutil.Process) -> float:
    """Of a server and all that it started."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def compared(ours: list[dict[str, Any]], peer: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """A row of the table; p50 and p99 are of the waits of all rounds."""
    mine, theirs = (statistics.median(round_["wall"] for round_ in rounds) for rounds in (ours, peer))
    row = {"name": f"serving_c{clients}", "ours": mine, "peer": theirs, "ratio": mine / theirs, "unit": "s an image"}
    row |= {
        "cpu_ours": statistics.median(r["cpu"] for r in ours),
        "cpu_peer": statistics.median(r["cpu"] for r in peer),
    }
    for side, rounds in (("ours", ours), ("peer", peer)):
        waits = sorted(wait for round_ in rounds for wait in round_["waits"])
        row |= {f"p50_{side}": statistics.median(waits), f"p99_{side}": waits[int(0.99 * (len(waits) - 1))]}
    return row


def first_preview(url: str, seed: int) -> tuple[float, float]:
    """Seconds to the first preview of an image, and to the image, for one client."""
    body = {"prompt": "", "label": "food", "seed": seed, "stream": True, "partial_images": PREVIEWS}
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if first is None and line.startswith(b"event: image_generation.partial_image"):
                first = time.perf_counter() - started
    assert first is not None
    return first, time.perf_counter() - started


def directly(folder: Path, images: int) -> float:
    """Seconds an image of the cascade itself, for the batches of a service that is asked for so many at once."""
    cascade = Cascade.load(folder)
    requests = [Request(label="food", seed=seed) for seed in range(images)]
    cascade.sample(requests[:16])
    started = time.perf_counter()
    cascade.sample(requests, batch_size=16)
    return (time.perf_counter() - started) / images


def many_at_once(url: str, images: int) -> float:
    """Seconds an image where one client asks for so many in calls of 16 at once."""
    started = time.perf_counter()
    for start in range(0, images, 16):
        body = {"prompt": "", "label": "food", "seed": start, "n": min(16, images - start)}
        assert len(json.loads(post(f"{url}/v1/images/generations", body))["data"]) == body["n"]
    return (time.perf_counter() - started) / images


def rows(rounds: int) -> list[dict[str, Any]]:
    """Seconds an image with 1, 4 and 16 clients; the first preview as a share of the whole; and the direct call."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, ExitStack() as stack:
        home = Path(scratch)
        folder = write_bench_cascade(home / "models")
        tracking = register(folder, home)
        bin_, port, peer_port = Path(sys.executable).parent, free_port(), free_port()
        path = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "MLFLOW_TRACKING_URI": tracking}
        source, url = f"models:/{NAME}@champion", f"http://127.0.0.1:{port}"
        serve = [str(bin_ / "cascade"), "serve", "--model", source, "--port", str(port), "--tracking", tracking]
        ours = stack.enter_context(server(serve, path, f"{url}/healthz", home))
        mlflow = [str(bin_ / "mlflow"), "models", "serve", "--model-uri", source, "--env-manager", "local"]
        mlflow += ["--host", "127.0.0.1", "--port", str(peer_port)]
        more = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "600"}
        peer_url = f"http://127.0.0.1:{peer_port}"
        peer = stack.enter_context(server(mlflow, path | more, f"{peer_url}/health", home))
        sides = [(ask_ours(url), ours), (ask_mlflow(peer_url), peer)]
        found = []
        for clients in CLIENTS:
            every = [[measure(ask, clients, process) for ask, process in sides] for _ in range(rounds + 1)][1:]
            found.append(compared([pair[0] for pair in every], [pair[1] for pair in every], clients))
        previews = [first_preview(url, seed) for seed in range(rounds + 1)][1:]
        first, whole = (statistics.median(column) for column in zip(*previews, strict=True))
        found.append(
            {"name": "serving_first_preview", "ours": first, "peer": whole, "ratio": first / whole, "unit": "s"}
        )
        os.environ |= SHARED_CORES  # as the replica has them; libgomp reads them as it is loaded, hence a new process
        alone = stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        both = [(many_at_once(url, 32), alone.submit(directly, folder, 32).result()) for _ in range(rounds + 1)]
        pairs = both[1:]
        mine, direct = (statistics.median(column) for column in zip(*pairs, strict=True))
        found.append(
            {"name": "serving_direct", "ours": mine, "peer": direct, "ratio": mine / direct, "unit": "s an image"}
        )
    return found
