"""Laws of joining a cluster: what stands in the way is said in one line, before Ray's native code says it in twenty.

The head is a server that speaks Ray's own protocol, with the answers that each test needs.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from components.configuration.usage import UsageError
from pipelines.engine import session
from pipelines.planning import joining
from pipelines.planning.joining import check_cluster
from tests.conftest import free_port

Start = Callable[..., str]
TOKEN = "5ec7e7" * 10


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def __init__(self, *, version: str, socket: Path, token: str) -> None:
        self.version, self.socket, self.token = version, socket, token

    def CheckAlive(self, request, context):  # noqa: N802
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token is missing")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def GetAllNodeInfo(self, request, context):  # noqa: N802
        node = gcs_pb2.GcsNodeInfo(state=gcs_pb2.GcsNodeInfo.ALIVE, raylet_socket_name=str(self.socket))
        return gcs_service_pb2.GetAllNodeInfoReply(node_info_list=[node])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Start]:
    """Starts a head; returns its address."""
    (tmp_path / "raylet").touch()
    servers = []

    def start(*, version: str = ray.__version__, socket: str = "raylet", token: str = "") -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        servant = Head(version=version, socket=tmp_path / socket, token=token)
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(servant, server)
        port = server.add_insecure_port("0.0.0.0:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "TOKEN_FILE", str(tmp_path / "none"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def set_token(token: str, place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RAY_AUTH_MODE, and the token in a variable, in a file that one names, or where Ray keeps it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (folder / "token").write_text(f"{token}\n")
    if place == "file":
        monkeypatch.setattr(joining, "TOKEN_FILE", str(folder / "token"))
    else:
        monkeypatch.setenv(place, token if place == "RAY_AUTH_TOKEN" else str(folder / "token"))


def refusal(address: str) -> str:
    with pytest.raises(UsageError) as caught:
        check_cluster(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cluster_of_this_ray_with_a_node_on_this_machine_can_be_joined_and_others_are_told_why_not(head: Start):
    check_cluster(head())
    said = refusal(address := head(version="2.59.1"))
    assert said.startswith(f"the cluster at {address} is Ray 2.59.1, this program runs on Ray {ray.__version__};")
    assert "is no node of the cluster" in refusal(head(socket="elsewhere"))


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": TOKEN}])
def test_who_shows_no_token_is_told_of_both_variables(
    head: Start, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refusal(head(token=TOKEN)).endswith("set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own")


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "file"])
def test_the_token_is_taken_from_where_ray_takes_it_and_a_file_that_is_not_there_is_said(
    head: Start, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_token(TOKEN, place, tmp_path, monkeypatch)
    check_cluster(address := head(token=TOKEN))
    if place == "RAY_AUTH_TOKEN_PATH":
        monkeypatch.setenv(place, "/no/such/token")
        assert "RAY_AUTH_TOKEN_PATH /no/such/token can't be read" in refusal(address)


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_refusal_names_the_variable_of_the_wrong_token_and_never_the_token(
    head: Start, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_token("0ddba11", place, tmp_path, monkeypatch)
    said = refusal(head(token=TOKEN))
    assert f"refuses the token of {place}" in said
    assert "0ddba11" not in said


def test_an_address_that_nobody_listens_on_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ANSWER_SECONDS", 0.1)
    said = refusal(address := f"127.0.0.1:{free_port()}")
    assert said.startswith(f"no Ray cluster answers at {address} (")
    assert "Connection refused" in said


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "head"])
def test_what_is_no_address_of_a_head_is_left_to_ray(address: str) -> None:
    check_cluster(address)


def test_what_ray_says_in_many_lines_is_one(monkeypatch: pytest.MonkeyPatch, head: Start) -> None:
    def other_python(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n")

    monkeypatch.setenv("RAY_ADDRESS", address := head())
    monkeypatch.setattr(session, "set_environment", lambda settings: None)
    monkeypatch.setattr(session.ray, "init", other_python)
    said = f"^Ray can't join {address}: Version mismatch: The cluster was started with: Ray: 2.60.0 Python: 3.12.1"
    with pytest.raises(UsageError, match=said) as caught:
        session.start_ray(worker_start_timeout=10, verbose=False)
    assert "\n" not in str(caught.value)
