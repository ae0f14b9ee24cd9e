"""A registered model needs nothing but its own requirements and the code that it carries."""

import base64
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.runtime.tracking.registry import save_model
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from tests.faults.conftest import Record
from tests.tiny_cascade import write_cascade

PROVES = ("components/models", "components/sampling", "components/runtime/tracking")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_the_packed_cascade_samples_in_a_fresh_virtual_environment(tmp_path: Path, record: Record):
    """pip installs the model's requirements.txt from where this machine gets its packages; that takes minutes."""
    folder, packed = write_cascade(tmp_path), tmp_path / "packed"
    save_model(packed, folder)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", packed / "requirements.txt"], check=True)
    program = f"""
        import json, sys, mlflow
        model = mlflow.pyfunc.load_model("{packed}")
        images = model.predict([{{"label": "food", "seed": 5}}, {{"prompt": "red apple", "generator": "tokens"}}])
        ours = [module.__file__ for name, module in sys.modules.items() if name.startswith("image_cascade")]
        assert ours and all(file.startswith("{packed}") for file in ours), ours
        assert "ray" not in sys.modules
        print(json.dumps(images))
    """
    command = [python, "-I", "-c", textwrap.dedent(program)]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in json.loads(out.splitlines()[-1])]
    ours = Cascade.load(folder).sample([Request(label="food", seed=5), Request(prompt="red apple", generator="tokens")])
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(ours, theirs, strict=True)) <= 1
    record("none: a packed cascade in a new environment without this repository", 1, "both generators' images the same")
