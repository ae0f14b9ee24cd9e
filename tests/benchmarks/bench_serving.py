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
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from components.sampling.cascade import Cascade, compose
from components.sampling.requests import Request
from pipelines.command.options import SHARED_CORES
from tests.benchmarks.interleaving import Row, cpu_of_tree, row
from tests.conftest import free_port, wait_for
from tests.served_models import track_cascade
from tests.tiny_cascade import CLASSES, DIFFUSION, UNET, UPSAMPLER, write_model

NAME = "image-cascade-bench"
CLIENTS, IMAGES_EACH = (1, 4, 16), 3
PREVIEWS = 8
NETWORK = UNET | {"model_channels": 64, "num_res_blocks": 2, "attention_resolutions": [8], "head_dim": 32}
FEW = {"sampler": "ddim", "num_inference_steps": 10}
Ask = Callable[[int], list[str]]  # for the image of a seed


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


def ask(url: str, seed: int, count: int = 1) -> list[str]:
    """PNGs in base64 of as many images as asked for of the service, by label and seed."""
    body = {"prompt": "", "label": CLASSES[seed % len(CLASSES)], "seed": seed, "n": count}
    return [entry["b64_json"] for entry in json.load(post(f"{url}/v1/images/generations", body))["data"]]


def ask_mlflow(url: str, seed: int) -> list[str]:
    body = {"inputs": [{"label": CLASSES[seed % len(CLASSES)], "seed": seed}]}
    return json.load(post(f"{url}/invocations", body))["predictions"]


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def measure(make: Ask, clients: int, process: psutil.Process) -> dict[str, Any]:
    """Seconds an image, CPU seconds an image, and the waits of all clients."""
    waits: list[float] = []  # appended to by all threads

    def client(number: int) -> None:
        for turn in range(IMAGES_EACH):
            started = time.perf_counter()
            (image,) = make(1000 * number + turn)
            waits.append(time.perf_counter() - started)
            assert base64.b64decode(image).startswith(b"\x89PNG")

    cpu, started = cpu_of_tree(process), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    wall = time.perf_counter() - started
    return {"wall": wall / len(waits), "cpu": (cpu_of_tree(process) - cpu) / len(waits), "waits": waits}


def compared(ours: list[dict[str, Any]], peer: list[dict[str, Any]], clients: int) -> Row:
    """A row of the table; p50 and p99 are of the waits of all rounds."""
    more: dict[str, float] = {}
    for side, rounds in (("ours", ours), ("peer", peer)):
        waits = sorted(wait for round_ in rounds for wait in round_["waits"])
        more |= {f"cpu_{side}": statistics.median(round_["cpu"] for round_ in rounds)}
        more |= {f"p50_{side}": statistics.median(waits), f"p99_{side}": waits[int(0.99 * (len(waits) - 1))]}
    mine, theirs = (statistics.median(round_["wall"] for round_ in rounds) for rounds in (ours, peer))
    return row(f"serving_c{clients}", mine, theirs, "s an image", **more)


def first_preview(url: str, seed: int) -> tuple[float, float]:
    """Seconds to the first preview of an image, and to the image, for one client."""
    body = {"prompt": "", "label": "food", "seed": seed, "stream": True, "partial_images": PREVIEWS}
    started = time.perf_counter()
    with post(f"{url}/v1/images/generations", body) as answer:
        seen = [(time.perf_counter(), line) for line in answer]
    first = next(at for at, line in seen if line.startswith(b"event: image_generation.partial_image"))
    return first - started, time.perf_counter() - started


def both_at_once(url: str, folder: Path, images: int, pool: ProcessPoolExecutor) -> tuple[float, float]:
    """Seconds an image where one client asks for so many in calls of 16, and of the cascade itself in such batches."""
    started = time.perf_counter()
    for start in range(0, images, 16):
        assert len(ask(url, start, 16)) == 16
    return (time.perf_counter() - started) / images, pool.submit(directly, folder, images).result()


def directly(folder: Path, images: int) -> float:
    cascade = Cascade.load(folder)
    requests = [Request(label="food", seed=seed) for seed in range(images)]
    cascade.sample(requests[:16])
    started = time.perf_counter()
    cascade.sample(requests, batch_size=16)
    return (time.perf_counter() - started) / images


def rows(rounds: int) -> list[Row]:
    """Seconds an image with 1, 4 and 16 clients; the first preview as a share of the whole; and the direct call."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, ExitStack() as stack:
        home = Path(scratch)
        larger = NETWORK | {"resolution": 32, "low_res": True, "model_channels": 32}
        upsampler = DIFFUSION | UPSAMPLER | {"resolution": 32, "low_res_resolution": 16}
        base = write_model(
            home / "base", "unet", NETWORK | {"resolution": 16}, DIFFUSION | {"role": "base", "resolution": 16}
        )
        upsamplers = {"upsampler_32": write_model(home / "upsampler_32", "unet", larger, upsampler)}
        few = {"base": FEW, "upsampler_32": FEW | {"num_inference_steps": 5, "noise_level": 5}}
        folder = compose(home / "cascade", base=base, upsamplers=upsamplers, sampling=few)
        tracking = f"sqlite:///{home / 'mlflow.db'}"
        track_cascade(tracking, home, folder, "k1", recipe="bench")
        bin_, port, peer_port = Path(sys.executable).parent, free_port(), free_port()
        path = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "MLFLOW_TRACKING_URI": tracking}
        source, url, peer_url = f"models:/{NAME}@champion", f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        serve = [str(bin_ / "cascade"), "serve", "--model", source, "--port", str(port), "--tracking", tracking]
        ours = stack.enter_context(server(serve, path, f"{url}/healthz", home))
        mlflow = [str(bin_ / "mlflow"), "models", "serve", "--model-uri", source, "--env-manager", "local"]
        mlflow += ["--host", "127.0.0.1", "--port", str(peer_port)]
        more = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "600"}
        peer = stack.enter_context(server(mlflow, path | more, f"{peer_url}/health", home))
        sides = [(partial(ask, url), ours), (partial(ask_mlflow, peer_url), peer)]
        found = []
        for clients in CLIENTS:
            every = [[measure(make, clients, process) for make, process in sides] for _ in range(rounds + 1)][1:]
            found.append(compared(*map(list, zip(*every, strict=True)), clients))
        previews = [first_preview(url, seed) for seed in range(rounds + 1)][1:]
        found.append(row("serving_first_preview", *map(statistics.median, zip(*previews, strict=True))))
        os.environ |= SHARED_CORES  # as the replica has them; libgomp reads them as it is loaded, hence a new process
        alone = stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        pairs = [both_at_once(url, folder, 32, alone) for _ in range(rounds + 1)][1:]
        found.append(row("serving_direct", *map(statistics.median, zip(*pairs, strict=True)), "s an image"))
    return found
