"""The model card of `cascade export`, and `--push`: the hub gets the files that the folder has."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from PIL import Image

from components.evaluation.grids import CELL
from components.runtime.tracking.registry import description_of
from components.weights import exporting
from pipelines.command.upkeep import known_of
from tests.hub_models import model_hub
from tests.in_process import in_process
from tests.refusals import assert_refused
from tests.served_models import NAME, Registry
from tests.tiny_cascade import commit_model
from tests.tiny_generators import LONE, TOKENIZER, lone, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GAN as a stage commits it."""
    return Path(commit_model(tmp_path, "gan", "k1", write(tmp_path / "m", *LONE["gan"])).root)


def export(folder: Path, model: Path, *more: str):
    return in_process("export", str(model), "--as", "pt2", "--out", "made", *more, cwd=folder)


def test_a_hub_gets_the_files_of_the_folder_and_a_card_that_says_who_made_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with model_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        done = export(tmp_path, model, "--push", "me/gan")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.endpoint}/me/gan" in done.stdout
    assert set(hub.tokens) == {"Bearer hf_mine"}
    folder = tmp_path / "made"
    local = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == {f"me/gan/{name}": content for name, content in local.items()}
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, "image-cascade" in card.data.tags) == ("pytorch", True)
    assert "Model `gan/k1`, made by abc123" in card.text
    assert f"- {model.name}: network.pt2" in card.text, "by its own name, not that of a copy"


def test_the_card_shows_samples_of_each_class(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """As many images as are asked for, above their classes' names; a model that makes none is refused at once."""
    done = export(tmp_path, model, "--samples", "3")
    assert done.returncode == 0, done.stderr
    assert "![Samples](samples.png)" in ModelCard.load(tmp_path / "made/README.md").text
    with Image.open(tmp_path / "made/samples.png") as grid:
        assert grid.width > 3 * CELL > grid.height - CELL
    monkeypatch.setattr(exporting, "write_parts", None)
    alone = str(write(tmp_path / "tokenizer", "autoencoder", TOKENIZER, {"resolution": 16}))
    done = in_process("export", alone, "--as", "pt2", "--out", "none", "--samples", "3", cwd=tmp_path)
    assert_refused(done, f"no cascade at {alone}")
    assert not (tmp_path / "none").exists()


def test_a_hub_that_takes_no_files_is_one_line_and_the_folder_stays(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    with model_hub(refuses=True) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        done = export(tmp_path, model, "--push", "me/gan")
    assert_refused(done, "--push me/gan: the hub takes no files", "401")
    assert (tmp_path / "made/network.pt2").is_file()


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(export(tmp_path, model, "--push", "me/gan"), "--push me/gan: the hub takes no files", "refused")


def test_the_card_of_a_registered_model_has_what_its_run_wrote(tmp_path: Path, empty_database: Path):
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    client = MlflowClient(uri)
    client.create_registered_model("image-cascade-gan", description="Trained on 100 images; their license: CC0-1.0.")
    client.create_model_version("image-cascade-gan", str(tmp_path), description="| distance | 12.0 ± 0.3 |")
    known = description_of("models:/image-cascade-gan/1", tracking_uri=uri)
    assert known == known_of("models:/image-cascade-gan/1", uri)
    exporting.write_card(tmp_path / "README.md", "gan", ["gan: network.pt2"], form="pt2", known=known)
    text = (tmp_path / "README.md").read_text()
    assert "their license: CC0-1.0." in text
    assert "| distance | 12.0 ± 0.3 |" in text


def test_the_card_of_a_version_has_the_name_as_its_title(tmp_path: Path, empty_database: Path):
    (tmp_path / "registry").mkdir()
    registry = Registry(tmp_path / "registry", empty_database)
    number = registry.register(lone("gan", tmp_path), key="k1")
    arguments = [f"models:/{NAME}/{number}", "--as", "pt2", "--out", "made", "--tracking", registry.uri]
    done = in_process("export", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"# {NAME}\n" in (tmp_path / "made/README.md").read_text()


def test_a_bare_folder_says_that_nothing_is_known(tmp_path: Path):
    write(tmp_path / "m", *LONE["gan"])
    assert known_of(str(tmp_path / "m"), None) == ""
    exporting.write_card(tmp_path / "README.md", "m", [], form="onnx", known="")
    assert "Nothing is recorded of its data, license or figures." in (tmp_path / "README.md").read_text()
