"""Benchmarks are not run by the suite; that the product still has what they import is held here."""

import importlib
from pathlib import Path

import pytest

from tests import benchmarks

FOLDER = Path(benchmarks.__file__).parent
PEERS = FOLDER / "peers"  # programs of other environments
OWN = [path for path in FOLDER.rglob("[a-z]*.py") if PEERS not in path.parents]
MODULES = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in OWN)


@pytest.mark.parametrize("module", MODULES)
def test_a_benchmark_imports_what_the_product_has(module: str) -> None:
    importlib.import_module(f"{benchmarks.__name__}.{module}")
