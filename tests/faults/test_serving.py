"""A service under fire: each request is answered once, with the right image, or refused with 429 or 503."""

import base64
import io
import itertools
import json
import os
import shutil
import signal
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
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from components.runtime.tracking.names import KEY
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from tests.conftest import free_port, wait_for
from tests.emulators import in_environment
from tests.faults.cluster import Nodes, nodes, processes
from tests.faults.conftest import Record
from tests.served_models import track_cascade
from tests.serving_backend import sending
from tests.tiny_cascade import CLASSES, write_cascade
from tests.waiting import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/serving",)
NAME = "image-cascade-tiny"
REFUSED = (429, 503)
REPLICA, API = "ray::ServeReplica:image-cascade", ":Api"
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
        body = json.dumps({"prompt": "", "label": label, "seed": seed, "steps": steps}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/images/generations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                made = json.load(answer)
        except urllib.error.HTTPError as error:
            return Answer(error.code, seed, label, steps, retry_after=error.headers["Retry-After"])
        (data,) = made["data"]
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))
        return Answer(200, seed, label, steps, made["version"], image)

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
        """Answers to so many requests at least; after a third something happens, and they go on until it has."""
        answers: list[Answer] = []
        seeds, done = itertools.count(), threading.Event()

        def client() -> None:
            while len(answers) < count or not done.is_set():
                answers.append(self.ask(next(seeds)))

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client) for _ in range(CLIENTS)]
            try:
                assert eventually(lambda: len(answers) >= count // 3, seconds=180)
                disturb()
            finally:
                done.set()
            for each in clients:
                each.result()
        return answers

    def replicas(self, deployment: str) -> list[psutil.Process]:
        every = [self.cluster.cluster.head_node, *self.cluster.cluster.worker_nodes]
        return [
            process
            for node in every
            for process in processes(node, REPLICA)
            if deployment in " ".join(process.cmdline())
        ]

    def healthy(self) -> None:
        """Wait until an image is made again."""
        assert eventually(lambda: self.ask(1).status == 200, seconds=180)


def champion_of(registry: MlflowClient) -> str:
    return str(registry.get_model_version_by_alias(NAME, "champion").version)


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
    track_cascade(tracking, home, another(folder, home / "other"), "k2")
    track_cascade(tracking, home, folder, "k1")
    registry = MlflowClient(tracking)
    keys = {found.tags[KEY]: str(found.version) for found in registry.search_model_versions(f"name='{NAME}'")}
    versions = {keys["k1"]: Cascade.load(folder), keys["k2"]: Cascade.load(home / "other")}
    settings = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "components.serving.middleware:middlewares"}
    # Nodes share an address here: else a proxy on the lost node would get some of the connections until its end, which
    # a balancer, asking its health, sends elsewhere from the notice on.
    settings["SERVE_SOCKET_REUSE_PORT_ENABLED"] = "0"
    with in_environment(settings), nodes(2) as cluster, open(home / "serve.log", "wb") as log:
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


def proof(counts: Counter[int]) -> str:
    right, refused = counts[200], sum(counts[status] for status in REFUSED)
    return f"of {counts.total()} requests {right} answered with the right image, {refused} refused with 429 or 503"


def survived(service: Service, disturb: Callable[[], None], *, answered: int = 50) -> Counter[int]:
    """Answers to a hundred requests and more, with a disturbance among them, and an image after it."""
    counts = service.check(service.under_way(100, disturb))
    assert counts[200] >= answered
    service.healthy()
    return counts


def test_a_killed_replica_of_the_model_loses_no_request(service: Service, record: Record):
    for _ in range(2):
        counts = survived(service, lambda: service.replicas(f":{NAME}")[0].kill(), answered=80)
    record("kill -9 of a model's replica, 8 clients", 2, proof(counts))


def test_a_killed_api_loses_no_request(service: Service, record: Record):
    counts = survived(service, lambda: service.replicas(API)[0].kill())
    record("kill -9 of the API's process, 8 clients", 1, proof(counts))


def test_a_moved_alias_mixes_no_request_and_loses_none(service: Service, record: Record):
    before = champion_of(service.registry)
    (after,) = {*service.versions} - {before}

    def move() -> None:
        service.registry.set_registered_model_alias(NAME, "champion", after)
        assert eventually(lambda: all(service.ask(seed).version == after for seed in range(8)), seconds=180)

    answers = service.under_way(100, move)
    counts = service.check(answers)
    assert set(counts) == {200}
    assert {answer.version for answer in answers} == {before, after}
    record("alias moved, 8 clients", 1, f"{proof(counts)}, each of one version")


def test_clients_that_vanish_leave_the_others_their_images(service: Service, record: Record):
    def vanish() -> None:
        for seed in range(41):
            data = json.dumps({"prompt": "", "label": "food", "seed": seed, "steps": 50, "n": 4}).encode()
            with sending(service.url, data, length=len(data)):
                time.sleep(0.05)

    record("41 clients vanish, 8 others ask", 41, proof(survived(service, vanish)))


def test_a_node_that_is_drained_and_then_lost_loses_no_request(service: Service, record: Record):
    def drain() -> None:
        node = next(node for node in service.cluster.cluster.worker_nodes if processes(node, REPLICA))
        service.cluster.add()
        service.cluster.drain(node, seconds=20)
        time.sleep(20)
        service.cluster.kill(node)

    record("a node drained and then lost", 1, proof(survived(service, drain)))
