"""Options that several commands take, and what their help says of them."""

from typing import Annotated, Literal

import typer

SAMPLERS = "ddpm, ddim, dpm_solver_pp, sde_dpm_solver_pp, heun or euler"  # here, so that --help imports no torch

Recipe = Annotated[str, typer.Option(help="A recipe by name (see `cascade recipes`) or a YAML file.")]
Sampling = Annotated[list[str], typer.Option("--set", help="A sampling setting: base.eta=0.5. Repeatable.")]
Set = Annotated[list[str], typer.Option("--set", help="Override one number: base.total_steps=2000. Repeatable.")]
Storage = Annotated[
    str | None, typer.Option(help="Where artifacts go: a folder, s3://…, gs://… or az://…  [CASCADE_STORAGE or ./runs]")
]
Tracking = Annotated[str | None, typer.Option(help="MLflow: http://… or sqlite:///…  [MLFLOW_TRACKING_URI or ./runs]")]
ProfileName = Annotated[str, typer.Option(help="Workers and GPUs: auto, laptop, kuberay, or a YAML file.")]
Name = Annotated[
    str | None,
    typer.Option(
        help="What the run and its models (image-cascade-NAME) are called. Left out: the recipe's name, or with images "
        "of your own that of their folder or bucket: photos, class_guided_on_photos with another than the demo."
    ),
]
Promote = Annotated[
    Literal["better", "always", "never"],
    typer.Option(
        help="Whether the run's models become champions. better: if no distance is worse than the champion's by more "
        "than its error, measured on the same images in the same way."
    ),
]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run; the same name goes on with the same run.")]
