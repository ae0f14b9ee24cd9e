"""`--like image.png`: an image made again by the settings in the PNG.

Options of the command line take precedence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from components.sampling.cascade import Cascade
from components.sampling.request_forms import read_settings, request_of
from components.sampling.requests import IMAGES, Request, StageSettings, nested_settings, request_options

TAKES = {"image": "translate", "mask": "translate", "condition": "sample"}  # commands, of images


class Like(NamedTuple):
    """How an image was made; of no image, the defaults of a request."""

    request: Request = Request()
    model: str | None = None  # models:/NAME/VERSION, of a registered one
    needs: tuple[str, ...] = ()  # images that the request had

    def check_given(self, **images: object) -> None:
        """Raise ValueError, in one line, for a missing image, or for an image that the command doesn't take."""
        for name in self.needs:
            if name not in images:
                raise ValueError(f"the image of --like was made with --{name}, which `cascade {TAKES[name]}` takes")
            if not images[name]:
                raise ValueError(f"the image of --like was made with --{name}: give it again")


def read_like(path: Path | None) -> Like:
    """Reads the settings in a PNG. Raises ValueError, in one line, for a file without settings."""
    if path is None:
        return Like()
    if not path.is_file():
        raise ValueError(f"--like {path}: no such file")
    try:
        settings = read_settings(path.read_bytes())
        if settings is None:
            raise ValueError("this PNG has no settings; give one image that cascade sample, translate or serve made")
        needs = settings.get("needs")
        images = tuple(name for name in IMAGES if isinstance(needs, list) and name in needs)
        return Like(request_of(settings), _registered(settings), images)
    except ValueError as error:
        raise ValueError(f"--like {path}: {error}") from error


def named_model(model: str | None, like: Like) -> str:
    """Returns the model to load: the command's, else the image's.

    Raises ValueError if neither is named.
    """
    found = model or like.model
    if found is None:
        wanted = "models:/NAME@champion, or the folder of a cascade artifact"
        raise ValueError(f"name the model with --model: {wanted}; only the image of a registered model names its own")
    return found


def asked_like(like: Like, cascade: Cascade, options: Mapping[str, Any], *, sampling: StageSettings) -> Request:
    """Returns the request of an image, with the command's options where they are not None.

    Args:
        sampling: of `--set`; an option is stronger than what the image has for the same setting of a stage.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    request = cascade.with_generator(like.request.replace(**changes))
    maker, marks = cascade.makers.get(str(request.generator)), request_options()
    first = "" if maker is None else maker.first.name
    replaced = {(mark.stage or first, mark.setting) for name in changes if (mark := marks.get(name))}
    kept = [each for each in request.sampling if each[:2] not in replaced]
    return request.replace(sampling=nested_settings((*kept, *sampling)))


def _registered(settings: Mapping[str, Any]) -> str | None:
    name, version = str(settings.get("model")), str(settings.get("version"))
    known = re.fullmatch(r"[^/:@]+", name) and re.fullmatch(r"\d+", version)
    return f"models:/{name}/{version}" if known else None
