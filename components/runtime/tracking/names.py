"""What models are called in MLflow's registry."""

from pathlib import PurePosixPath

REGISTRY = "models:/"  # how addresses of registered models start


def registered_name(models: str, *, stage: str | None = None) -> str:
    """`image-cascade-{models}` is the composed cascade of a run, `image-cascade-{models}-{stage}` one of its models."""
    return f"image-cascade-{models}" + (f"-{stage}" if stage else "")


def shown_source(source: str) -> str:
    """A model's source as others are told it: without the place of a folder, which is nobody's business."""
    return source if source.startswith(REGISTRY) else PurePosixPath(source.rstrip("/")).name
