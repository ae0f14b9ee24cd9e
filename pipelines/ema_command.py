"""`cascade ema`: a trained model with an average of its weights of another length."""

from pathlib import Path

from components.storage.bundle import DESCRIPTION
from components.training.snapshots import choose_average
from pipelines.sample_command import local_model
from pipelines.workflow import UsageError


def write_average(model: str, *, length: float, tracking: str | None, out: Path) -> Path:
    """Write the model with an average of that length, a share of training in (0, 0.28), to `out`, and return it.

    Raises UsageError for a model that is not there or kept no snapshots, a length that has no average, and a folder
    that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} holds something already: name a new folder")
    try:
        with local_model(model, tracking) as folder:
            if not (folder / DESCRIPTION).is_file():
                raise UsageError(f"{model} is a whole cascade, which keeps no snapshots: give the model of one stage")
            choose_average(folder, out, sigma_rel=length)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return out
