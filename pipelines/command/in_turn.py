"""The commands of many recipes, `cascade lecture` and `cascade compare`; `cli.py` lists both."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.command.options import ProfileName, Storage, Tracking

Figures = Annotated[
    Path | None, typer.Option("--json", help="A file that gets the figures of what is finished, with commit and date.")
]


def lecture(
    names: Annotated[list[str] | None, typer.Argument(help="Rows (T3) or recipes (vqgan); all if left out.")] = None,
    storage: Storage = None,
    tracking: Tracking = None,
    profile: ProfileName = "auto",
    figures: Figures = None,
) -> None:
    """Run the lecture, each system by its own recipe; after each, write the page `lecture.html`.

    Finished stages are cached, so the command goes on where it was stopped. The page lies in storage.

    **Examples**

    - `cascade lecture` — all of it, a few minutes a recipe on two cores
    - `cascade lecture T1 G1 maskgit` — three of them
    """
    from pipelines.suites.lecture import run_lecture

    code = run_lecture(
        names or [], storage=storage, tracking=tracking, profile=profile, console=Console(), figures=figures
    )
    raise typer.Exit(code)


def compare(
    systems: Annotated[list[str] | None, typer.Argument(help="Systems, such as gan or ddpm; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of trainings and samples; rows of other seeds stay.", min=0)] = 0,
    storage: Storage = None,
    tracking: Tracking = None,
    profile: ProfileName = "auto",
    figures: Figures = None,
) -> None:
    """Measure the lecture's taxonomy, VAE to GAN to cascade, on the same images of 32².

    Finished stages are cached, so the command goes on where it was stopped. `compare.html` in storage is written after
    each system, one table and one plot: bits/dim, distance, precision, recall, time to train and to sample, parameters.

    **Examples**

    - `cascade compare` — all of them, about ten minutes each on two cores
    - `cascade compare gan ddpm` — two of them
    - `cascade compare gan vae --seed 1` — two once more with another seed: both trainings stand in the table
    """
    from pipelines.suites.compare import run_compare

    code = run_compare(
        systems or [],
        seed=seed,
        storage=storage,
        tracking=tracking,
        profile=profile,
        console=Console(),
        figures=figures,
    )
    raise typer.Exit(code)
