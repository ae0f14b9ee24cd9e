"""Networks so small only lose by more than one core, where other tests have the cores too."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
