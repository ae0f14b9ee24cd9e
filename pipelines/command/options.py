"""Options of several commands with help texts, and the environment of waiting threads."""

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from components.configuration.usage import UsageError
from components.sampling.requests import Option, Request, plain_type

Recipe = Annotated[str, typer.Option(help="A recipe by name (see `cascade recipes`) or a YAML file.")]
LIKE = "A PNG of these commands: made again as it was, but for the options given. Its model is the default."
Model = Annotated[str | None, typer.Option(help="models:/NAME@champion, or the folder or URL of a cascade artifact.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image; the others count on.  [0]", min=0)]
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
Only = Annotated[list[str], typer.Option(help="Run only this stage. Repeatable.")]
From = Annotated[str | None, typer.Option("--from", help="Run this stage and what follows it.")]
Until = Annotated[str | None, typer.Option(help="Run this stage and what it needs.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Run the selected stages even where they are cached; interrupted, the command without it goes on.",
    ),
]
Fastest = Annotated[
    bool | None, typer.Option("--fastest/--cheapest", help="Train on the GPUs of the fewest hours, or lowest price.")
]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run; the same name goes on with the same run.")]
Command = Callable[..., None]


def check_out(out: str | Path) -> None:
    """Raise UsageError for a folder of the local disk out of reach for writing."""
    address = str(out).removeprefix("file://")
    if "://" in address:
        return
    there = next(place for place in (Path(address).absolute(), *Path(address).absolute().parents) if place.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))  # root may write everywhere, and makes no folder in /proc
    except OSError:
        raise UsageError(f"--out {out}: {there} is no folder that can be written to; name another") from None


def write_new(out: Path, name: str, png: bytes) -> None:
    """Write NAME.png, with a number where the folder has another image of the name."""
    out.mkdir(parents=True, exist_ok=True)
    path, number = out / f"{name}.png", 1
    while path.exists() and path.read_bytes() != png:
        path, number = out / f"{name}-{number}.png", number + 1
    path.write_bytes(png)


def takes_options(options: Mapping[str, Option], *, before: str, **help_texts: str) -> Callable[[Command], Command]:
    """Returns a decorator that puts options of a request in front of `before`, for `**options`.
    `help_texts`: what `--help` says of an option where the command has words of its own."""

    def decorate(command: Any) -> Command:
        own = [each for name, each in inspect.signature(command).parameters.items() if name != "options"]
        place, named = [each.name for each in own].index(before), inspect.Parameter.KEYWORD_ONLY
        added = []
        for name, option in options.items():
            about = typer.Option(help=help_texts.get(name, option.help), min=option.ge)
            kind: Any = plain_type(Request.model_fields[name]) or str
            added.append(inspect.Parameter(name, named, default=None, annotation=Annotated[kind | None, about]))
        parameters = [each.replace(kind=named) for each in (*own[:place], *added, *own[place:])]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


# Between two operations torch's threads wait for each other. By default they spin, up to 300,000 times; where another
# program has one of their cores, that keeps the thread that is waited for from it. Measured with two threads of tiny
# networks on two cores with a load of 15 to 40: 25 to 50 s of sampling, and 0.7 to 1 s with this; the same bits.
SHARED_CORES = {"GOMP_SPINCOUNT": "1000"}  # libgomp's own number where there are more threads than cores


def share_cores() -> None:
    """Let waiting threads give their core away soon, unless the user's environment says otherwise.
    To be called before torch is imported, whose libgomp reads these settings as it is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(SHARED_CORES | os.environ)
