import pathlib
import subprocess

import pytest

from tests.house import Module, modules


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The top folder of the checkout."""
    return pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tracked_files(repository: pathlib.Path) -> list[pathlib.Path]:
    """Every file that git tracks."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, check=True, capture_output=True, text=True)
    return [path for name in listing.stdout.split("\0") if name and (path := repository / name).is_file()]


@pytest.fixture(scope="session")
def house(repository: pathlib.Path) -> list[Module]:
    """Every module of the two packages, by name."""
    return modules(repository)
