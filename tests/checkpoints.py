"""Checkpoints that a test writes in its own process, where a training writes them behind its steps."""

from pathlib import Path
from typing import Any

from components.training.checkpoint import copy_to_host, refuse_non_finite, write_host_copy


def write_checkpoint(folder: Path, state: dict[str, Any], *, step: int) -> None:
    """Write `state` as it is after `step` steps. Raises NonFiniteError, writing nothing, if a weight is not finite."""
    refuse_non_finite(state["weights"], step=step)
    write_host_copy(folder, copy_to_host(state, step=step))
