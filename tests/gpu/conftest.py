import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The GPU. Without one nothing here can be held, and the session ends with a line and an error."""
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a GPU that torch can use, and there is none here", returncode=1)
    return torch.device("cuda", 0)
