"""What models are called in MLflow's registry."""


def registered_name(models: str, *, stage: str | None = None) -> str:
    """`image-cascade-{models}` is the composed cascade of a run, `image-cascade-{models}-{stage}` one of its models."""
    return f"image-cascade-{models}" + (f"-{stage}" if stage else "")
