"""In the editable install `image_cascade.components` and `image_cascade.pipelines` are the checkout's folders.

They are second names of the same modules, never second copies: whichever name is imported, the module is made once and
calls itself `components.…` or `pipelines.…`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType

PREFIX = f"{__package__}."
ROOMS = (f"{PREFIX}components", f"{PREFIX}pipelines")


class SecondName(MetaPathFinder, Loader):
    """Finds a module of the package under its name in the checkout."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for what is not of the checkout's folders, and for what is not there."""
        if not name.startswith(ROOMS) or find_spec(name.removeprefix(PREFIX)) is None:
            return None
        return spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself. The import is about to give it the new name's spec, so its own one is kept there."""
        module = import_module(spec.name.removeprefix(PREFIX))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; it is given its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, SecondName())
