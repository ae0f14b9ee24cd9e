"""Other workflows from the command to the registry; secrets of the environment are used, and written down nowhere."""

import base64
import io
import shutil
import stat
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from components.data.sources.scenes import render, scene
from components.runtime.storage.artifact import Artifact, load_artifact
from components.runtime.storage.store import Store
from components.sampling.image_files import encode_png
from tests.in_process import in_process
from tests.integration.conftest import FEW, IN_ADDRESS, SCENES, SECRETS, SHOWN, Run, read_folder, settings


def champion(recipe: str, tracking_uri: str) -> mlflow.pyfunc.PyFuncModel:
    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.pyfunc.load_model(f"models:/image-cascade-{recipe}@champion")


def size(answer: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(answer))) as image:
        return image.size


@pytest.fixture(scope="module")
def depth(
    ray_cluster: None, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Artifact], Path]:
    """The artifacts by stage, and where MLflow's tables are."""
    folder = tmp_path_factory.mktemp("depth")
    shutil.copy(empty_database, folder)
    trained = [name for part in ("tokenizer", "condition.tokenizer", "prior") for name in settings(part, **FEW)]
    command = ["run", "--recipe", "depth_transformer", "--tracking", f"sqlite:///{folder}/mlflow.db"]
    done = in_process(*command, *SCENES, *SHOWN, *trained, cwd=folder, on_ray=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "report: " in done.stdout
    manifests = folder.glob("runs/stages/*/*/manifest.json")
    artifacts = {path.parts[-3]: load_artifact(Store(str(path.parent))) for path in manifests}
    return {name: artifact for name, artifact in artifacts.items() if artifact is not None}, folder


def test_a_prior_learns_after_the_tokens_of_depth_maps(depth: tuple[dict[str, Artifact], Path]):
    artifacts, _ = depth
    assert artifacts["prior"].metadata["summary"]["held_out_bits_per_token"] > 0
    assert artifacts["condition"].metadata["member"] == "depth"
    assert "tokens_by_condition.png" in artifacts["samples"].names()
    assert "originals_and_reconstructions.png" in artifacts["evaluation"].names()


def test_the_registered_model_answers_to_a_depth_map_by_seed(depth: tuple[dict[str, Artifact], Path]):
    _, folder = depth
    _, distances, _ = render(scene(3), resolution=32)
    inverse = 1 / distances
    grey = np.rint(255 * (inverse - inverse.min()) / (inverse.max() - inverse.min())).astype(np.uint8)
    condition = base64.b64encode(encode_png(np.repeat(grey[..., None], 3, axis=2))).decode()
    model = champion("depth_transformer", f"sqlite:///{folder}/mlflow.db")
    first, second, other = model.predict([{"condition": condition, "seed": seed} for seed in (1, 1, 2)])
    assert first == second != other
    assert size(first) == (32, 32)


def test_every_model_of_the_generator_is_registered(depth: tuple[dict[str, Artifact], Path]):
    _, folder = depth
    names = {model.name for model in MlflowClient(f"sqlite:///{folder}/mlflow.db").search_registered_models()}
    stages = {"", "-tokenizer", "-condition_tokenizer", "-prior"}
    assert names == {f"image-cascade-depth_transformer{stage}" for stage in stages}


def test_a_gan_by_itself_trains_and_answers_from_the_registry(gan_run: Run):
    assert any(name.endswith("gan_by_class.png") for name in gan_run.files)
    assert "report: s3://secrets/runs/" in gan_run.printed
    name = "gan_on_openmoji"  # not the recipe's own images
    rows = [{"label": "0", "seed": seed} for seed in (1, 1, 2)]
    first, second, other = champion(name, gan_run.tracking).predict(rows)
    assert first == second != other
    assert size(first) == (32, 32)


def test_run_models_report_and_what_is_printed_agree_on_a_name_that_is_the_images(gan_run: Run):
    name = "image-cascade-gan_on_openmoji"
    names = {model.name for model in MlflowClient(gan_run.tracking).search_registered_models()}
    (report,) = [(path, data.decode()) for path, data in gan_run.files.items() if path.endswith("/report.html")]
    assert {name, f"{name}-gan"} <= names
    assert not {"image-cascade-gan", "image-cascade-gan-gan"} & names
    assert report[0].split("/")[-2].startswith("gan_on_openmoji-")
    assert f"</i> {name}<" in report[1]
    assert f"model: models:/{name}@champion" in gan_run.printed


def is_private(path: Path, root: Path) -> bool:
    """Whether the file, or a folder on the way to it, is its owner's alone."""
    return any(not place.stat().st_mode & 0o077 for place in (path, *path.parents) if place.is_relative_to(root))


def leaks(files: dict[str, bytes]) -> list[str]:
    hidden = {**SECRETS, "the address": IN_ADDRESS}
    return [
        f"{kind} in {name}"
        for name, data in files.items()
        for kind, secret in hidden.items()
        if secret.encode() in data
    ]


def test_nothing_that_is_printed_stored_or_tracked_holds_a_secret(gan_run: Run) -> None:
    assert {"manifest.json", "report.html"} <= {Path(name).name for name in gan_run.files}
    assert len(gan_run.tracked) > 3
    assert leaks({"output": gan_run.printed.encode()}) == []
    assert leaks(gan_run.files) == []
    assert leaks(gan_run.tracked) == []


def test_no_log_and_no_local_file_holds_a_secret(gan_run: Run) -> None:
    logs = read_folder(gan_run.ray)
    assert any(Path(name).suffix == ".log" for name in logs)
    assert leaks(logs) == []
    readable = {
        name: data for name, data in read_folder(gan_run.folder).items() if not is_private(Path(name), gan_run.folder)
    }
    assert leaks(readable) == []


def test_a_token_is_readable_by_its_owner_alone(gan_run: Run) -> None:
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or stat.S_IMODE(token.stat().st_mode) == 0o600
