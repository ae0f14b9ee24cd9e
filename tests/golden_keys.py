"""Keys of the demo's and of smoke's stages, whatever their sources hold; as a program, with a field more in every
configuration: `python -m tests.golden_keys DEFAULT` prints them as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

from components.configuration import config

GOLDEN = Path(__file__).parent / "golden" / "keys.txt"
RECIPES = ("scenes", "openmoji", "smoke")
LISTING = "0" * 64  # in the place of the digest of what a source lists


def current_keys() -> dict[str, str]:
    """`recipe/stage` -> key."""
    from pipelines.recipes.catalog import load_recipe
    from pipelines.workflow import stage_keys
    from pipelines.workflows import build_workflow

    with patch("components.stages.images.source_digest", return_value=LISTING):
        workflows = [build_workflow(load_recipe(name, [])) for name in RECIPES]
        return {f"{w.name}/{stage}": key for w in workflows for stage, key in stage_keys(w.stages).items()}


def add_a_field(default: int) -> None:
    """Give every configuration that is defined from now on a field that is younger than its keys, where 1 is before."""

    class Younger(config.Config):
        younger: Annotated[int, config.Since(1)] = default

    config.Config = Younger


if __name__ == "__main__":
    add_a_field(int(sys.argv[1]))
    print(json.dumps(current_keys()))
