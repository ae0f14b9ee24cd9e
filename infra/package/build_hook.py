"""Builds the wheel: the folders `components` and `pipelines` as one package, `image_cascade`.

hatchling copies the files to their places there (`sources` in pyproject.toml); the modules among them are replaced by
what `renamed` makes of them. A file says of which commit all is, in a source distribution too. The editable install has
the checkout on its path and needs none of this.
"""

import re
import runpy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.wheel import WheelBuilderConfig
from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"!?\[([^]]*)\]\((?![a-z]+:)[^)]*\)")  # to a file of the repository, whose address no package knows
RENAMING = "components/runtime/tracking/packed_code.py"
PROVENANCE = "pipelines/engine/provenance.py"
PACKAGE = "image_cascade"


class OnePackage(BuildHookInterface[WheelBuilderConfig]):
    """hatchling calls `initialize` before it writes an archive and `finalize` after it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files that differ from those of the checkout."""
        self.scratch = TemporaryDirectory()
        root, scratch = Path(self.root), Path(self.scratch.name)
        if version == "editable":
            return
        provenance = runpy.run_path(str(root / PROVENANCE))
        name = provenance["COMMIT"]
        (scratch / name).write_text(provenance["commit"](root) + "\n")
        build_data["force_include"][str(scratch / name)] = name if self.target_name == "sdist" else f"{PACKAGE}/{name}"
        if self.target_name == "sdist":
            return
        code = runpy.run_path(str(root / RENAMING))
        for file in self.build_config.builder.recurse_selected_project_files():
            if file.path.endswith(".py"):
                renamed = scratch / file.distribution_path
                renamed.parent.mkdir(parents=True, exist_ok=True)
                renamed.write_text(code["renamed"](Path(file.path).read_text(), code["INSTALLED"]))
                build_data["force_include"][str(renamed)] = file.distribution_path

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was written on the way."""
        del version, build_data, artifact_path
        self.scratch.cleanup()


class Readme(MetadataHookInterface):
    """The README as the package's description: what links to a file beside it is plain text there."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add it to the project's metadata."""
        text = LINK.sub(r"\1", (Path(self.root) / "README.md").read_text())
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
