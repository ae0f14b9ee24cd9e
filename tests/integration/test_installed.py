"""The wheel's way: what is built is installed far from the checkout, and trains, samples, serves, and is imported."""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.recipes.catalog import load_recipe, resolved_yaml
from tests.bare_environment import bare_python
from tests.conftest import free_port, stop, wait_for
from tests.integration.conftest import FEW, SCENES, settings

ROOT = Path(__file__).resolve().parents[2]
MODEL = "models:/image-cascade-mine@champion"
MINE = [
    *SCENES,
    *settings("model", **FEW, channels=8, discriminator_channels=8),
    *settings("samples", measured_samples=8, images_per_class=1, num_prompts=2, images_per_prompt=2),
    *settings("evaluation", reference_samples=32, held_out_samples=8),
]


class Installed(NamedTuple):
    python: Path
    folder: Path  # where the user works
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a command of the environment prints."""
        program = [str(self.python.with_name(command[0])), *command[1:]]
        done = subprocess.run(
            program, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The wheel in an environment where others' `components` and `pipelines` are, and a small recipe, `mine.yaml`."""
    home = tmp_path_factory.mktemp("installed")
    python, folder = bare_python(home / "environment"), home / "user"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(home)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([python, *command], check=True, capture_output=True)
    folder.mkdir()
    recipe = load_recipe("gan", [assignment.removeprefix("--set=") for assignment in MINE])
    (folder / "mine.yaml").write_text(resolved_yaml(recipe.model_copy(update={"name": "mine"})))
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as ray:  # short: Ray's sockets are in it
        variables = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
        made = Installed(python, folder, variables | {"PATH": path, "RAY_TMPDIR": ray})
        made.run("cascade", "run", "--recipe", "mine.yaml")
        yield made


def test_a_recipe_is_trained_registered_and_sampled(installed: Installed):
    assert list(installed.folder.glob("runs/runs/*/report.html"))
    installed.run("cascade", "sample", "--model", MODEL, "--label", "0", "--count", "1", "--seed", "7", "--out", "made")
    assert list((installed.folder / "made").glob("*.png"))


def test_its_service_answers(installed: Installed):
    port = free_port()
    command = [str(installed.python.with_name("cascade")), "serve", "--model", MODEL, "--port", str(port)]
    process = subprocess.Popen(command, cwd=installed.folder, env=installed.environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz", process)
        body, headers = json.dumps({"prompt": "", "label": 0, "seed": 7}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/images/generations", body, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["data"][0]["b64_json"]
    finally:
        stop(process)


def test_the_examples_of_the_api_s_page_run_as_they_stand(installed: Installed):
    """After `mine.yaml` was run: all is cached."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "API.md").read_text(), re.MULTILINE | re.DOTALL)
    program = ["import image_cascade", "import sys", "assert 'torch' not in sys.modules", *blocks]
    program += ["assert all(getattr(image_cascade, name) for name in image_cascade.__all__)"]
    program += ["assert image_cascade.Cascade.__module__ == 'image_cascade.components.sampling.cascade'"]
    (installed.folder / "page.py").write_text("\n".join(program))
    printed = installed.run("python", "page.py")
    assert "to run" not in printed
    assert printed.splitlines()[-1].endswith("did you mean 'limit'?")
    assert all((installed.folder / f"{number}.png").stat().st_size for number in (0, 1))
