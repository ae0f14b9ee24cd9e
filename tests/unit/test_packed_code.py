"""Laws of code under another name."""

import ast
from pathlib import Path

import pytest

from components.runtime.tracking import packed_code
from components.runtime.tracking.packed_code import INSTALLED, model_code, pack_code, renamed

SOURCE = '''"""components.models, in words, stays."""
import components
import numpy, components.models.losses as losses, components_of_others
from components.runtime import events
from components.models.unet import (
    UNet,  # of components.models
)
from pipelines.command.cli import main
from components_of_others import components
from .near import components as near


def later():
    word = "Füße"; from components.runtime.storage import store
    if True: import pipelines
    return store, components.__name__
'''


def test_imports_at_any_depth_are_renamed_and_nothing_else():
    before, after = SOURCE.splitlines(), renamed(SOURCE, INSTALLED).splitlines()
    assert {number: line for number, line in enumerate(after, 1) if line != before[number - 1]} == {
        2: "import image_cascade.components as components",
        3: "import numpy, image_cascade.components.models.losses as losses, components_of_others",
        4: "from image_cascade.components.runtime import events",
        5: "from image_cascade.components.models.unet import (",
        8: "from image_cascade.pipelines.command.cli import main",
        14: '    word = "Füße"; from image_cascade.components.runtime.storage import store',
        15: "    if True: import image_cascade.pipelines as pipelines",
    }


def test_renaming_twice_is_renaming_once_and_a_second_name_follows():
    public = renamed(SOURCE, INSTALLED)
    assert renamed(public, INSTALLED) == public
    private = renamed(public, {"image_cascade": "image_cascade_1a"})
    assert private == public.replace("image_cascade.", "image_cascade_1a.")


@pytest.mark.parametrize("line", ["import components.models", "from  components import events"])
def test_an_import_that_cannot_be_renamed_is_refused(line: str):
    with pytest.raises(ValueError, match="line 2: write"):
        renamed(f"\n{line}", INSTALLED)


def test_every_packed_module_imports_from_its_own_package(tmp_path: Path):
    package = pack_code(tmp_path)
    texts = [path.read_text() for path in package.rglob("*.py")] + [model_code(package.name)]
    modules = [node.module for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    roots = {module.partition(".")[0] for module in modules}
    assert package.name in roots
    assert not roots & {"components", "pipelines", "image_cascade"}


def test_a_package_is_named_after_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = pack_code(tmp_path / "first")
    assert pack_code(tmp_path / "again").name == first.name
    rooms = tmp_path / "wheel" / "image_cascade" / "components"
    rooms.parent.mkdir(parents=True)
    for path in packed_code.ROOM.parents[1].rglob("*.py"):
        copy = rooms / path.relative_to(packed_code.ROOM.parents[1])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(renamed(path.read_text(), INSTALLED))
    monkeypatch.setattr(packed_code, "ROOM", rooms / "runtime" / "tracking")
    assert pack_code(tmp_path / "from_wheel").name == first.name
    with (rooms / "models" / "unet.py").open("a") as code:
        code.write("# another version\n")
    assert pack_code(tmp_path / "changed").name != first.name
