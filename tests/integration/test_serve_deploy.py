"""The RayService's own serve config on the cluster of infra/local: `serve deploy`, answers, what Prometheus sees."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

from components.serving.deployment import APPLICATION
from tests.conftest import free_port
from tests.local_cluster import ROOT, local_cluster
from tests.metric_names import Query, lacking, queries, series_at
from tests.served_models import track_cascade
from tests.tiny_cascade import write_cascade

OVERLAY = ROOT / "infra/kuberay/overlays/service"
KEYS = f"key-of-one-client-{'1' * 32},key-of-another-{'2' * 32}"
MINUTE = 40  # images of a key
BODY = {"prompt": "red apple", "label": "food", "seed": 5, "size": "auto"}

pytestmark = pytest.mark.timeout(900)


class Answer(NamedTuple):
    code: int
    body: Any  # of its JSON
    retry_after: str | None = None


class Service(NamedTuple):
    url: str
    folder: Path  # of the cluster's own files
    keys: Path
    dashboard: str
    token: str


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((OVERLAY / name).read_text())


def deployed_config(tracking: str, port: int) -> dict[str, Any]:
    """The RayService's, but for the model and what one machine without a GPU can't have."""
    config = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    models = [{"name": "tiny", "source": "models:/image-cascade-tiny@champion"}]
    application["args"] |= {"models": models, "tracking": tracking, "cpus": 1, "gpus": 0}
    assert application["args"]["api_replicas"] == 2
    application["args"]["limits"]["key_images_minute"] = MINUTE
    return config


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """What `serve deploy` started with the environment that the pods have."""
    folder, home, port = tmp_path_factory.mktemp("cluster"), tmp_path_factory.mktemp("home"), free_port()
    (home / "keys").write_text(KEYS)
    variables = {**manifest("settings.yaml")["data"], "CASCADE_API_KEYS_FILE": str(home / "keys")}
    with local_cluster(folder, **variables) as known:
        track_cascade(known["MLFLOW_TRACKING_URI"], home, write_cascade(home / "made"), "k1")
        config = home / "serve.yaml"
        config.write_text(yaml.safe_dump(deployed_config(known["MLFLOW_TRACKING_URI"], port)))
        dashboard = known["RAY_API_SERVER_ADDRESS"]
        command = ["serve", "deploy", str(config), "--address", dashboard]
        done = subprocess.run(command, cwd=home, env=known, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        service = Service(f"http://127.0.0.1:{port}", folder, home / "keys", dashboard, (folder / "token").read_text())
        wait_until_running(service)
        yield service


def from_dashboard(service: Service, path: str) -> Any:
    headers = {"Authorization": f"Bearer {service.token}"}
    request = urllib.request.Request(service.dashboard + path, headers=headers)
    return json.load(urllib.request.urlopen(request, timeout=30))


def wait_until_running(service: Service) -> None:
    deadline = time.monotonic() + 300
    while True:
        application = from_dashboard(service, "/api/serve/applications/")["applications"][APPLICATION]
        if application["status"] == "RUNNING":
            return
        assert application["status"] in ("DEPLOYING", "NOT_STARTED"), json.dumps(application)[-3000:]
        assert time.monotonic() < deadline, json.dumps(application)[-3000:]
        time.sleep(1)


def ask(service: Service, body: dict[str, Any], key: str | None) -> Answer:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{service.url}/v1/images/generations"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return Answer(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.load(error), error.headers["Retry-After"])


@pytest.mark.parametrize("key", KEYS.split(","))
def test_each_key_of_the_secret_gets_an_image_of_the_registered_version(service: Service, key: str):
    answer = ask(service, BODY, key)
    assert answer.code == 200, answer.body
    (made,) = answer.body["data"]
    image = Image.open(io.BytesIO(base64.b64decode(made["b64_json"])))
    assert (image.format, image.size) == ("PNG", (16, 16))
    assert (made["seed"], answer.body["model"], answer.body["version"]) == (5, "tiny", "1")


@pytest.mark.parametrize("key", [None, "key-of-a-stranger", KEYS])
def test_without_one_of_the_keys_nobody_gets_an_image(service: Service, key: str | None):
    answer = ask(service, BODY, key)
    assert answer.code == 401
    assert answer.body["error"]["message"]
    assert "key-of" not in json.dumps(answer.body)


def test_the_proxy_answers_what_kubernetes_and_the_operator_ask_it(service: Service):
    assert urllib.request.urlopen(f"{service.url}/-/healthz", timeout=10).status == 200


def processes(service: Service) -> dict[int, str]:
    """Title of each process of the cluster, known by the token that it was started with."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(service.folder).encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
    return found


def test_a_pod_that_goes_waits_for_what_is_called_as_its_script_says(service: Service):
    patch = next(step for step in manifest("serving-cluster.yaml") if step["path"].endswith("preStop/exec/command/2"))
    title = re.search(r"grep -qsa '(\S+)'", patch["value"])
    assert title is not None
    replicas = [pid for pid, name in processes(service).items() if re.search(title.group(1), name)]
    assert len(replicas) == 5, "two of the model, two of the API, one that counts for both"
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in replicas} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_two_processes_for_http_grant_one_share_together(service: Service):
    """Each request may go to either; shares that they counted apart would grant twice as many images."""
    key, began = KEYS.split(",")[1], time.monotonic()
    with ThreadPoolExecutor(2) as clients:
        answers = [*clients.map(lambda seed: ask(service, BODY | {"seed": seed, "n": 5}, key), range(24))]
    assert {answer.code for answer in answers} == {200, 429}
    granted = 5 * sum(answer.code == 200 for answer in answers)
    assert MINUTE - 5 <= granted <= MINUTE * (1 + (time.monotonic() - began) / 60)
    refused = next(answer for answer in answers if answer.code == 429)
    assert f"{MINUTE} images a minute" in refused.body["error"]["message"]
    assert int(refused.retry_after or 0) > 0


def test_a_changed_file_changes_the_keys_of_every_process(service: Service):
    """Asks for the list of models, which takes nothing of a key's share, however often it is asked."""
    new = f"key-of-a-third-{'3' * 32}"
    service.keys.write_text(f"{KEYS},{new}")
    request = urllib.request.Request(f"{service.url}/v1/models", headers={"Authorization": f"Bearer {new}"})
    codes = set[int]()
    deadline = time.monotonic() + 60
    while codes != {200}:
        codes = {status_of(request) for _ in range(12)}
        assert time.monotonic() < deadline, codes


def status_of(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def exported(service: Service) -> dict[str, set[str]]:
    (group,) = from_dashboard(service, "/api/prometheus/sd")
    return series_at(group["targets"][0])  # the node's agent; autoscaler and dashboard follow


def test_every_query_of_the_dashboard_finds_its_metrics_and_labels_even_when_nobody_asks_for_images(service: Service):
    asked = queries(ROOT / "infra/monitoring/cascade-serving.json")
    wanted = [query for query in asked if not query.panel.startswith("GPU")]  # here is none; see tests/contracts
    assert len(wanted) >= 10
    with ThreadPoolExecutor(4) as clients:
        codes = {
            answer.code
            for answer in clients.map(lambda seed: ask(service, BODY | {"seed": seed}, KEYS.split(",")[0]), range(8))
        }
    assert codes == {200}
    wait_for_all(wanted, service)
    time.sleep(40)  # Ray forgets a gauge that nobody sets for 20 s
    wait_for_all(wanted, service)


def wait_for_all(wanted: list[Query], service: Service) -> None:
    deadline = time.monotonic() + 90
    while missing := lacking(wanted, exported(service)):
        assert time.monotonic() < deadline, missing
        time.sleep(3)


def test_a_client_whose_api_process_is_lost_is_told_to_come_back_and_can(service: Service):
    key = KEYS.split(",")[0]
    replicas = [pid for pid, name in processes(service).items() if f"ServeReplica:{APPLICATION}:tiny" in name]
    apis = [pid for pid, name in processes(service).items() if f"ServeReplica:{APPLICATION}:Api" in name]
    for pid in replicas:
        os.kill(pid, signal.SIGSTOP)  # or they would answer before the API is lost
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(ask, service, BODY, key)
        time.sleep(3)
        for pid in apis:
            os.kill(pid, signal.SIGKILL)
        for pid in replicas:
            os.kill(pid, signal.SIGCONT)
        lost = asked.result()
    assert (lost.code, lost.retry_after) == (503, "1")
    assert lost.body["error"]["message"]
    deadline = time.monotonic() + 120
    while (answer := ask(service, BODY, key)).code != 200:
        assert answer.code == 503, answer
        assert time.monotonic() < deadline
        time.sleep(1)
