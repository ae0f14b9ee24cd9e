"""Whole training stages on tiny real images, in this process or in a driver of their own.

As a program: `python -m tests.distributed.runs FOLDER KIND WORKERS`.
"""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact, describe
from components.runtime.storage.store import Store
from components.stages.context import StageContext
from components.stages.tokens import TokensConfig, tokenize_images
from components.stages.training import train_model
from tests.distributed.recording import FileRecorder
from tests.image_sets import write_set
from tests.tiny_training import config_of

SHARDS = (30, 31, 29)
STAGES = {
    "tokenizer": train_model,
    "prior": train_model,
    "masked_prior": train_model,
    "base": train_model,
    "upsampler": train_model,
    "gan": train_model,
}


def images_artifact(folder: Path) -> Artifact:
    """A small set of images as the images stage leaves it."""
    store = Store(str(folder / "images"))
    if not store.exists("files/index.json"):
        write_set(store.join("files"), sizes=SHARDS, resolution=16)
    entries = tuple(describe(store.read(file.path), file.path) for file in store.list())
    return Artifact(kind="shards", stage="images", key="images", files=entries, root=store.uri)


def context_of(folder: Path, stage: str, *, workers: int, max_failures: int = 3) -> StageContext:
    resources = Resources(num_workers=workers, cpus_per_worker=0.5, max_failures=max_failures)
    recorder = FileRecorder(folder / f"{stage}.jsonl")
    return StageContext(stage, f"key-{stage}", Store(str(folder / stage)), resources, recorder, folder)


def inputs_of(folder: Path, kind: str, **changes: Any) -> dict[str, Artifact]:
    """The artifacts that a stage takes, made on the way where they are not given."""
    images = images_artifact(folder)
    if "prior" not in kind:
        return {"images": images}
    tokenizer = run_stage(folder, "tokenizer", workers=1, **changes)
    tokens = tokenize_images(
        TokensConfig(), context_of(folder, "tokens", workers=1), images=images, tokenizer=tokenizer
    )
    return {"tokens": tokens, "tokenizer": tokenizer}


def run_stage(folder: Path, kind: str, *, workers: int, **changes: Any) -> Artifact:
    """Run (or resume) one training stage in `folder`."""
    given = inputs_of(folder, kind)
    return STAGES[kind](config_of(kind, **changes), context_of(folder, kind, workers=workers), **given)


def model_weights(artifact: Artifact, folder: Path) -> dict[str, Tensor]:
    return load_file(artifact.download(folder) / "model.safetensors")


if __name__ == "__main__":
    from pipelines.engine.session import start_ray

    start_ray(worker_start_timeout=120, verbose=False)
    root, kind, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    changes = dict(argument.split("=") for argument in sys.argv[4:])
    run_stage(root, kind, workers=workers, **{name: int(value) for name, value in changes.items()})
