"""A sampling request: the single list of sampling options, and the source of all its forms.

The command's options, the HTTP API's fields, the registered model's signature, the settings in a PNG and the form of
the service's page all come from the fields of `Request`. A new sampling option is a field with its `Option`.
Imports no torch, so that `cascade sample --help` needs none.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from components.configuration.diffusion import TASKS
from components.configuration.sampling import DiffusionSampling
from components.models.diffusion.steps import SAMPLERS

IMAGES = ("image", "mask", "condition")
EXAMPLE = '{"upsampler_64": {"noise_level": 20}}'
StageSettings = tuple[tuple[str, str, Any], ...]  # (stage, setting, value)


def in_words(names: Sequence[str]) -> str:
    """Joins names for a sentence: `a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True, kw_only=True)
class Option:
    """How users set a field of a request.

    Bounds hold where users write numbers (command, API, page). A request itself may hold any number: the settings of
    the stage that it reaches have bounds of their own, and their message names the stage.
    """

    title: str  # on the page
    help: str  # of the command, and of the API where it has no description
    generators: tuple[str, ...]  # those that take it, by name
    setting: str = ""  # of a stage's sampling, which it is short for; "": the generator reads the field itself
    stage: str = ""  # whose setting; "": that of the generator's first model
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    hint: str = ""  # on the page
    description: str = ""  # of the API


def read_size(size: object) -> object:
    """Parses `64x128` as height and width; other types pass unchanged.

    Raises ValueError for other text.
    """
    if not isinstance(size, str):
        return size
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size {size}: write it as HEIGHTxWIDTH in pixels, such as 64x128")
    return int(height), int(width)


def stage_settings(nested: Any) -> StageSettings:
    """Returns nested sampling settings, or such JSON, as the hashable `Request.sampling`.

    The settings are by stage and name. A tuple is that already. Raises ValueError, in one line, for anything else.
    """
    if isinstance(nested, tuple):
        return nested
    if isinstance(nested, str):
        try:
            nested = json.loads(nested)
        except json.JSONDecodeError as error:
            raise ValueError(f"sampling must be JSON such as {EXAMPLE}, not {nested!r:.80}") from error
    if not isinstance(nested, Mapping) or not all(isinstance(own, Mapping) for own in nested.values()):
        raise ValueError(f"sampling must be such as {EXAMPLE}, not {nested!r:.80}")
    return tuple((stage, name, _frozen(value)) for stage, own in nested.items() for name, value in own.items())


def nested_settings(sampling: Iterable[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns `Request.sampling` by stage and name: the inverse of `stage_settings`.

    The last of equal names counts.
    """
    nested: dict[str, dict[str, Any]] = {}
    for stage, name, value in sampling:
        nested.setdefault(stage, {})[name] = value
    return nested


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a sampling setting is a number, a word, true, false, null or a list of them, not {value!r:.80}")


def _decoded(image: object) -> object:
    return base64.b64decode(image) if isinstance(image, str) else image


ImageFile = Annotated[bytes | None, BeforeValidator(_decoded)]
Size = Annotated[tuple[int, int] | None, BeforeValidator(read_size)]
Sampling = Annotated[StageSettings, BeforeValidator(stage_settings)]
DENOISING = ("diffusion", "translate")
DRAWING = ("tokens", "pixels")  # one value after another


class Request(BaseModel):
    """One image. A field that is None is left to the model's own settings.

    As plain values (`written`) images are base64, a size is HEIGHTxWIDTH, and `sampling` is nested by stage; a request
    can be made of these too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: int | str | None = None  # class id, or class name
    prompt: str | None = None
    seed: int = 0
    condition: Annotated[
        ImageFile,
        Option(
            title="Condition image",
            help="Image that the model is conditioned on, such as a depth map.",
            generators=("diffusion", "tokens"),
        ),
    ] = None
    image: Annotated[ImageFile, Option(title="Image", help="Image to work on.", generators=DENOISING)] = None
    mask: Annotated[
        ImageFile,
        Option(title="Mask", help="White where pixels are to be made; of the image's size.", generators=DENOISING),
    ] = None
    task: Annotated[
        str | None,
        Option(title="Task", help=f"{in_words(TASKS)}; else its only one.", generators=DENOISING),
    ] = None
    generator: str | None = None  # None: the first one that the cascade has
    steps: Annotated[
        int | None,
        Option(
            title="Steps",
            help="Denoising steps of the base model.",
            generators=(*DENOISING, "tokens"),
            setting="num_inference_steps",
            ge=1,
        ),
    ] = None
    sampler: Annotated[
        str | None,
        Option(
            title="Sampler",
            help=f"Of the base model: {in_words([*SAMPLERS])}.",
            generators=DENOISING,
            setting="sampler",
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Option(
            title="Guidance scale",
            help="1 turns guidance off.",
            generators=(*DENOISING, *DRAWING),
            setting="guidance_scale",
            ge=0,
            hint="1 is none",
            description="1 is no guidance.",
        ),
    ] = None
    classifier_scale: Annotated[
        float | None,
        Option(
            title="Classifier scale",
            help="Scale of the classifier; 0 is off.",
            generators=("diffusion",),
            setting="guidance_scale",
            stage="classifier",
            ge=0,
            hint="0 is off",
        ),
    ] = None
    truncation: Annotated[
        float | None,
        Option(
            title="Truncation",
            help="GAN: greatest |z| of the noise, such as 0.5.",
            generators=("gan",),
            setting="truncation",
            gt=0,
            hint="empty: none",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Option(
            title="Temperature",
            help="Token branch and pixels: 0 takes the likeliest.",
            generators=DRAWING,
            setting="temperature",
            ge=0,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Option(
            title="Top-k",
            help="Only so many of the likeliest values.",
            generators=DRAWING,
            setting="top_k",
            ge=1,
            hint="empty: all",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            title="Top-p",
            help="Only the likeliest values of so much probability.",
            generators=DRAWING,
            setting="top_p",
            gt=0,
            le=1,
            hint="empty: all",
        ),
    ] = None
    best_of: Annotated[
        int | None,
        Option(
            title="Best of",
            help="Token branch: keep the best of so many.",
            generators=("tokens",),
            setting="candidates",
            stage="reranker",
            ge=1,
            description="Candidates for each image, of which the one that its condition explains best is kept.",
        ),
    ] = None
    size: Annotated[
        Size,
        Option(
            title="Size",
            help="Token branch: a larger image, HEIGHTxWIDTH in pixels.",
            generators=("tokens",),
            hint="width x height",
        ),
    ] = None
    sampling: Sampling = ()  # (stage, setting, value): any sampling setting of any stage

    def replace(self, **changes: Any) -> "Request":
        """Returns the request with other fields.

        Raises ValueError, in one line, for a value of another type.
        """
        return read_request(dict(self) | changes)

    def written(self) -> dict[str, Any]:
        """Returns the set fields as plain values, from which `read_request` makes the request again."""
        written = {name: value for name, value in self if value not in (None, ())}
        for name in IMAGES:
            if name in written:
                written[name] = base64.b64encode(written[name]).decode()
        written |= {"size": "{}x{}".format(*self.size)} if self.size else {}
        return written | ({"sampling": nested_settings(self.sampling)} if self.sampling else {})


def read_request(values: Mapping[str, Any], *, source: str = "") -> Request:
    """Returns the request of fields, in the forms of `Request` or of `Request.written`.

    Args:
        source: words in front of a value of the wrong type, such as `the PNG says `.

    Raises ValueError, in one line, for a field that is unknown or no such value.
    """
    try:
        return Request(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(str(first["ctx"]["error"])) from None
        raise ValueError(f"{source}{first['loc'][0]} {first['input']!r:.80}: {first['msg']}") from None


def request_options() -> dict[str, Option]:
    """Returns the fields that only some generators take, by name."""
    marked = ((name, mark) for name, field in Request.model_fields.items() for mark in field.metadata)
    return {name: mark for name, mark in marked if isinstance(mark, Option)}


def plain_type(field: FieldInfo) -> type | None:
    """Returns int, float or str for a field of a single plain type (or None), else None."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str) else None


def typed_options() -> dict[str, Option]:
    """Returns the typed options: all but images, and the task, which needs an image to work on."""
    return {name: option for name, option in request_options().items() if name not in (*IMAGES, "task")}


def plain_options() -> dict[str, Option]:
    """Returns the typed options with a single number or word as value."""
    return {name: option for name, option in typed_options().items() if plain_type(Request.model_fields[name])}


def form_fields() -> dict[str, dict[str, Any]]:
    """Returns the controls of the service's page for the options, by name."""
    form: dict[str, dict[str, Any]] = {}
    for name, option in typed_options().items():
        kind = plain_type(Request.model_fields[name])
        control = {"text": option.title, "setting": option.setting, "stage": option.stage, "hint": option.hint}
        control["kind"] = name if kind is None else "word" if kind is str else "number"
        least = option.gt if option.ge is None else option.ge
        limits = {"min": least, "max": option.le, "step": 1 if kind is int else None}
        form[name] = {key: value for key, value in (control | limits).items() if value not in (None, "")}
    return form


def form_choices() -> dict[str, list[list[str]]]:
    """Returns the choices (word, title) of each sampling setting by name.

    An empty word is the automatic choice.
    """
    choices: dict[str, list[list[str]]] = {}
    titles: dict[str, str] = {name: kind.title for name, kind in SAMPLERS.items()}
    for name, field in DiffusionSampling.model_fields.items():
        kinds = get_args(field.annotation) if not _is_literal(field.annotation) else (field.annotation,)
        words = [word for kind in kinds if _is_literal(kind) for word in get_args(kind)]
        if words:
            automatic = [["", "automatic"]] if NoneType in kinds else []
            choices[name] = automatic + [[word, titles.get(word, word)] for word in words]
    return choices


def _is_literal(kind: object) -> bool:
    return getattr(kind, "__origin__", None) is Literal


def class_id(label: int | str, classes: Sequence[str]) -> int:
    """Returns the id of a class given by id (also as digits) or by name. Raises ValueError for any other."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    names = ", ".join(f"{index} {name}" for index, name in enumerate(classes[:20]))
    raise ValueError(f"unknown label {label!r}: the classes are {names}{', …' if len(classes) > 20 else ''}")
