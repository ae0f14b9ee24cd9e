"""A service under fire: each request is answered once, with the right image, or refused with 429 or 503."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from components import events
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.tracking.tracker import Tracker
from tests.conftest import free_port, wait_for
from tests.faults.cluster import Nodes, nodes, processes
from tests.faults.conftest import Record
from tests.tiny_cascade import CLASSES, commit_model, write_cascade

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
NAME = "image-cascade-tiny"
REFUSED = (429, 503)
MODEL, API = "ray::ServeReplica", "Api"
CLIENTS = 8


class Answer(NamedTuple):
    """What came of one request; one entry for each request that was sent."""

    status: int
    seed: int
    label: str
    steps: int
    version: str | None = None
    image: np.ndarray | None = None
    retry_after: str | None = None


class Service(NamedTuple):
    """A service on a cluster of two nodes, and what its versions make."""

    url: str
    cluster: Nodes
    registry: MlflowClient
    versions: dict[str, Cascade]

    def ask(self, seed: int, *, steps: int = 4) -> Answer:
        label = CLASSES[seed % len(CLASSES)]
        body = {"prompt": "", "label": label, "seed": seed, "steps": steps}
        try:
            with urllib.request.urlopen(generation(self.url, body), timeout=300) as answer:
                made = json.load(answer)
        except urllib.error.HTTPError as error:
            return Answer(error.code, seed, label, steps, retry_after=error.headers["Retry-After"])
        (data,) = made["data"]
        return Answer(200, seed, label, steps, made["version"], decoded(data["b64_json"]))

    def check(self, answers: list[Answer]) -> Counter[int]:
        """How many answers there are of each status; fails for a wrong image and for any other status."""
        for version, cascade in self.versions.items():
            made = [answer for answer in answers if answer.version == version]
            expected = cascade.sample([Request(label=a.label, seed=a.seed, steps=a.steps) for a in made])
            for answer, image in zip(made, expected, strict=True):
                assert answer.image is not None
                assert np.abs(answer.image.astype(int) - image).max() <= 1, f"seed {answer.seed}, version {version}"
        counts = Counter(answer.status for answer in answers)
        assert set(counts) <= {200, *REFUSED}, counts
        assert all(answer.retry_after for answer in answers if answer.status != 200)
        assert sum(answer.version in self.versions for answer in answers) == counts[200]
        return counts

    def under_way(self, count: int, disturb: Callable[[], None]) -> list[Answer]:
        """Answers to so many requests, while a third of them are answered, something happens."""
        done = threading.Semaphore(0)

        def one(seed: int) -> Answer:
            answer = self.ask(seed)
            done.release()
            return answer

        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = pool.map(one, range(count))
            for _ in range(count // 3):
                assert done.acquire(timeout=300)
            disturb()
            return list(answers)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        every = [self.cluster.cluster.head_node, *self.cluster.cluster.worker_nodes]
        return [
            process for node in every for process in processes(node, MODEL) if deployment in " ".join(process.cmdline())
        ]

    def healthy(self) -> None:
        """Wait until an image is made again."""
        deadline = time.monotonic() + 180
        while (answer := self.ask(1)).status != 200:
            assert time.monotonic() < deadline, answer
            time.sleep(1)


def generation(url: str, body: dict[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), headers)


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def register(tracking: str, home: Path, folder: Path, key: str) -> None:
    tracker = Tracker(tracking, experiment="tiny", spool=home / f"spool-{key}", flush_seconds=0.3)
    tracker.emit(events.RunStarted("run", "", {}, {"name": "tiny"}))
    tracker.emit(events.StageCached("cascade", commit_model(home, "cascade", key, folder)))
    assert tracker.close("FINISHED") == []


def another(folder: Path, target: Path) -> Path:
    """The same cascade with another sampling setting of its upsampler: other images."""
    shutil.copytree(folder, target)
    description = json.loads((target / "cascade.json").read_text())
    description["sampling"]["upsampler_16"] |= {"noise_level": 20, "num_inference_steps": 3}
    (target / "cascade.json").write_text(json.dumps(description))
    return target


@pytest.fixture(scope="module")
def service(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """On two nodes and a head that works for no model; two replicas of the model."""
    home, port = tmp_path_factory.mktemp("serving"), free_port()
    folder = write_cascade(home / "models")
    tracking = f"sqlite:///{shutil.copy(empty_database, home)}"
    register(tracking, home, another(folder, home / "other"), "k2")
    register(tracking, home, folder, "k1")
    registry = MlflowClient(tracking)
    (champion,) = (registry.get_model_version_by_alias(NAME, "champion").version,)
    other = next(v.version for v in registry.search_model_versions(f"name='{NAME}'") if v.version != champion)
    versions = {champion: Cascade.load(folder), other: Cascade.load(home / "other")}
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "components.serving.unanswered:middlewares"
    with nodes(2) as cluster, open(home / "serve.log", "wb") as log:
        command = [str(Path(sys.executable).with_name("cascade")), "serve", "--model", f"models:/{NAME}@champion"]
        command += ["--port", str(port), "--tracking", tracking, "--replicas", "2"]
        variables = os.environ | {"RAY_ADDRESS": cluster.address}
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/healthz", process)
            yield Service(f"http://127.0.0.1:{port}", cluster, registry, versions)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    del os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]


def test_a_killed_replica_of_the_model_loses_no_request(service: Service, record: Record):
    for _ in range(2):
        answers = service.under_way(100, lambda: service.replicas("Model")[0].kill())
        counts = service.check(answers)
        assert len(answers) == 100
        assert counts[200] >= 80
        service.healthy()
    record("kill -9 of a model's replica, 8 clients", 2, f"{counts[200]} of 100 right, the others refused with 503")


def test_a_killed_api_loses_no_request(service: Service, record: Record):
    answers = service.under_way(100, lambda: service.replicas(API)[0].kill())
    counts = service.check(answers)
    assert counts[200] >= 50
    service.healthy()
    record("kill -9 of the API's process, 8 clients", 1, f"{counts[200]} of 100 right, the others refused with 503")


def test_a_moved_alias_mixes_no_request_and_loses_none(service: Service, record: Record):
    before = service.registry.get_model_version_by_alias(NAME, "champion").version
    after = next(version for version in service.versions if version != before)
    moved = threading.Event()

    def move() -> None:
        service.registry.set_registered_model_alias(NAME, "champion", after)
        moved.set()

    answers = service.under_way(100, move)
    deadline = time.monotonic() + 120
    while (last := service.ask(len(answers))).version != after:
        answers.append(last)
        assert time.monotonic() < deadline
    counts = service.check([*answers, last])
    assert set(counts) == {200}
    record("alias moved, 8 clients", 1, f"{counts[200]} of {counts[200]} right, each of one version")


def test_clients_that_vanish_leave_the_others_their_images(service: Service, record: Record):
    def vanish() -> None:
        for seed in range(41):
            body = {"prompt": "", "label": "food", "seed": seed, "steps": 50, "n": 4}
            sent = generation(service.url, body)
            host, _, port = service.url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port))) as client:
                data = sent.data
                assert isinstance(data, bytes)
                head = (
                    f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
                )
                client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                time.sleep(0.05)

    counts = service.check(service.under_way(100, vanish))
    assert counts[200] >= 50
    service.healthy()
    record("41 clients vanish, 8 others ask", 41, f"{counts[200]} of 100 right, the others refused")


def test_a_node_that_is_drained_and_then_lost_loses_no_request(service: Service, record: Record):
    def drain() -> None:
        node = service.cluster.cluster.worker_nodes[0]
        service.cluster.add()
        service.cluster.drain(node, seconds=20)
        time.sleep(20)
        service.cluster.kill(node)

    answers = service.under_way(100, drain)
    counts = service.check(answers)
    assert counts[200] >= 50
    service.healthy()
    record("a node drained and then lost", 1, f"{counts[200]} of 100 right, the others refused with 503")
