"""VQ-GAN, transformer prior and cascaded diffusion as one resumable workflow on Ray, MLflow and object storage.

The names below are the public interface (docs/API.md). Each is imported when it is first used: `import image_cascade`
loads neither torch nor Ray.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.configuration.usage import UsageError
    from components.runtime.storage.artifact import Artifact
    from components.runtime.storage.store import Store, StoreError
    from components.sampling.cascade import Cascade
    from components.sampling.image_files import encode_png
    from components.sampling.requests import Request
    from pipelines.command.library import RunError, load, plan, run
    from pipelines.recipes.catalog import load_recipe
    from pipelines.workflow import Stage, Workflow

if importlib.util.find_spec(f"{__name__}.components") is None:  # an editable install; see there
    importlib.import_module(f"{__name__}.checkout")

PLACES = {
    ".components.configuration.usage": ["UsageError"],
    ".components.sampling.cascade": ["Cascade"],
    ".components.sampling.image_files": ["encode_png"],
    ".components.sampling.requests": ["Request"],
    ".components.runtime.storage.artifact": ["Artifact"],
    ".components.runtime.storage.store": ["Store", "StoreError"],
    ".pipelines.command.library": ["RunError", "load", "plan", "run"],
    ".pipelines.recipes.catalog": ["load_recipe"],
    ".pipelines.workflow": ["Stage", "Workflow"],
}
__all__ = [
    "Artifact",
    "Cascade",
    "Request",
    "RunError",
    "Stage",
    "Store",
    "StoreError",
    "UsageError",
    "Workflow",
    "encode_png",
    "load",
    "load_recipe",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    for place, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(place, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
