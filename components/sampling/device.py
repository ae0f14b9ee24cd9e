"""Where a trained model works when nothing else is said."""

import torch


def best_device() -> torch.device:
    """A GPU where torch can use one, else the processor; `CUDA_VISIBLE_DEVICES=` in the environment hides every GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
