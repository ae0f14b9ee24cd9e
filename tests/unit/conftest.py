"""The service's tiny models behind HTTP, loaded once for all tests that ask them; one thread for networks so small."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    import openai

    from tests.serving_backend import SmallBackend


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Networks so small only lose by more than one core, where other tests have the cores too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, SmallBackend]":
    from tests.serving_backend import load_backends  # here and below: most tests need no service

    return load_backends(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def address(backends: "dict[str, SmallBackend]") -> Iterator[str]:
    from tests.serving_backend import serving

    with serving(*backends.values()) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> "openai.OpenAI":
    """The official client, which here checks each field of what it gets."""
    from tests.serving_backend import official

    return official(address)
