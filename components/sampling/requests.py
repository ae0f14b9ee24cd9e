"""A sampling request: the single list of sampling options, and the source of all its forms.

The command's options, the HTTP API's fields, the row of a registered model, the settings in a PNG and the form of the
service's page all come from the fields of `Request`. A new sampling option is a field with its `Option`. Imports no
torch, so that `cascade sample --help` needs none.
"""

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo

from components.configuration.diffusion import TASKS
from components.configuration.sampling import DiffusionSampling
from components.models.diffusion.steps import SAMPLERS
from components.sampling.image_files import open_header

IMAGES = ("image", "mask", "condition")
EXAMPLE = '{"upsampler_64": {"noise_level": 20}}'
StageSettings = tuple[tuple[str, str, Any], ...]  # (stage, setting, value)
DENOISING = ("diffusion", "translate")
DRAWING = ("tokens", "pixels")  # one value after another
SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "parameters"
MOST_TEXT = 2**20  # characters of settings that are read
HEADER = 33  # bytes: the signature and the first chunk, IHDR
NO_FIELDS = ("model", "version", "needs")  # settings that are no field of a request


def in_words(names: Sequence[str]) -> str:
    """Joins names for a sentence: `a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class Option:
    """How users set a field of a request.
    Bounds hold where users write numbers (command, API, page). A request itself may hold any number: the settings of
    the stage that it reaches have bounds of their own, and their message names the stage."""

    title: str  # on the page
    help: str  # of the command, and of the API where it has no description
    generators: tuple[str, ...]  # those that take it, by name
    _: KW_ONLY
    setting: str = ""  # of a stage's sampling; "": a field of the generator
    stage: str = ""  # whose setting; "": that of the generator's first model
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    hint: str = ""  # on the page
    description: str = ""  # of the API


def read_size(size: object) -> object:
    """Parses `128x64`, WIDTHxHEIGHT, as (height, width); other types pass. Raises ValueError."""
    if not isinstance(size, str):
        return size
    width, _, height = size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size {size}: write it as WIDTHxHEIGHT in pixels, such as 128x64")
    return int(height), int(width)


def stage_settings(nested: Any) -> StageSettings:
    """Returns sampling settings by stage and name, such JSON or such a tuple, as `Request.sampling`.
    Raises ValueError, in one line, for anything else."""
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
    """Inverse of `stage_settings`: settings by stage and name; the last of equal names counts."""
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


ImageFile = Annotated[
    bytes | None, BeforeValidator(lambda image: base64.b64decode(image) if isinstance(image, str) else image)
]
Size = Annotated[tuple[int, int] | None, BeforeValidator(read_size)]  # height, width
Sampling = Annotated[StageSettings, BeforeValidator(stage_settings)]


class Request(BaseModel, frozen=True, extra="forbid"):
    """One image. A field that is None is left to the model's own settings.
    As plain values (`written`) images are base64, a size is WIDTHxHEIGHT, and `sampling` is nested by stage; a request
    can be made of these too."""

    label: int | str | None = None  # class id, or class name
    prompt: str | None = None
    seed: int = 0
    condition: Annotated[
        ImageFile,
        Option(
            "Condition image", "Image that the model is conditioned on, such as a depth map.", ("diffusion", "tokens")
        ),
    ] = None
    image: Annotated[ImageFile, Option("Image", "Image to work on.", DENOISING)] = None
    mask: Annotated[ImageFile, Option("Mask", "White where pixels are to be made; of the image's size.", DENOISING)] = (
        None
    )
    task: Annotated[str | None, Option("Task", f"{in_words(TASKS)}; else its only one.", DENOISING)] = None
    generator: str | None = None  # None: the first one that the cascade has
    steps: Annotated[
        int | None,
        Option(
            "Steps", "Denoising steps of the base model.", (*DENOISING, "tokens"), setting="num_inference_steps", ge=1
        ),
    ] = None
    sampler: Annotated[
        str | None, Option("Sampler", f"Of the base model: {in_words([*SAMPLERS])}.", DENOISING, setting="sampler")
    ] = None
    guidance_scale: Annotated[
        float | None,
        Option(
            "Guidance scale",
            "1 turns guidance off.",
            (*DENOISING, *DRAWING),
            setting="guidance_scale",
            ge=0,
            hint="1 is none",
            description="1 is no guidance.",
        ),
    ] = None
    classifier_scale: Annotated[
        float | None,
        Option(
            "Classifier scale",
            "Scale of the classifier; 0 is off.",
            ("diffusion",),
            setting="guidance_scale",
            stage="classifier",
            ge=0,
            hint="0 is off",
        ),
    ] = None
    truncation: Annotated[
        float | None,
        Option(
            "Truncation",
            "GAN: greatest |z| of the noise, such as 0.5.",
            ("gan",),
            setting="truncation",
            gt=0,
            hint="empty: none",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Option("Temperature", "Token branch and pixels: 0 takes the likeliest.", DRAWING, setting="temperature", ge=0),
    ] = None
    top_k: Annotated[
        int | None,
        Option("Top-k", "Only so many of the likeliest values.", DRAWING, setting="top_k", ge=1, hint="empty: all"),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            "Top-p",
            "Only the likeliest values of so much probability.",
            DRAWING,
            setting="top_p",
            gt=0,
            le=1,
            hint="empty: all",
        ),
    ] = None
    best_of: Annotated[
        int | None,
        Option(
            "Best of",
            "Token branch: keep the best of so many.",
            ("tokens",),
            setting="candidates",
            stage="reranker",
            ge=1,
            description="Candidates for each image, of which the one that its condition explains best is kept.",
        ),
    ] = None
    size: Annotated[
        Size,
        Option("Size", "Token branch: a larger image, WIDTHxHEIGHT in pixels.", ("tokens",), hint="width x height"),
    ] = None
    sampling: Sampling = ()  # (stage, setting, value): any sampling setting of any stage

    def replace(self, **changes: Any) -> "Request":
        """Returns the request with other fields. Raises ValueError, in one line, for a value of another type."""
        return read_request(dict(self) | changes)

    def written(self) -> dict[str, Any]:
        """Returns the set fields as plain values, from which `read_request` makes the request again."""
        written = {name: value for name, value in self if value not in (None, ())}
        for name in IMAGES:
            if name in written:
                written[name] = base64.b64encode(written[name]).decode()
        written |= {"size": "{1}x{0}".format(*self.size)} if self.size else {}
        return written | ({"sampling": nested_settings(self.sampling)} if self.sampling else {})


def read_request(values: Mapping[str, Any], *, source: str = "") -> Request:
    """Returns the request of fields, in the forms of `Request` or of `Request.written`.
    Raises ValueError, in one line, `source` in front, for a field that is unknown or no such value."""
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
    """Returns the options but images, and but the task, which needs an image to work on."""
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
    """Choices (word, title) of each sampling setting by name; an empty word is the automatic choice."""
    choices: dict[str, list[list[str]]] = {}
    titles: dict[str, str] = {name: kind.title for name, kind in SAMPLERS.items()}
    for name, field in DiffusionSampling.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words:
            automatic = [["", "automatic"]] if NoneType in kinds else []
            choices[name] = automatic + [[word, titles.get(word, word)] for word in words]
    return choices


_columns: dict[str, Any] = {
    name: ((plain_type(field) or str) | None, None) for name, field in Request.model_fields.items()
}
_Row: Any = create_model("_Row", __config__=ConfigDict(extra="forbid"), **_columns)


class RequestRow(_Row):
    """One image that a registered model is asked for; a column that is left out is the model's own choice.
    Numbers stay numbers, all else is text: a class id as digits, images in base64, `sampling` as JSON."""

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: object, info: ValidationInfo) -> object:
        """Converts whole floats (of a data frame's column with a gap) and class ids to the column's type."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value) if info.field_name == "label" and isinstance(value, int) else value

    @classmethod
    def of(cls, request: Request) -> "RequestRow":
        """Returns the row of a request."""
        written = request.written()
        return cls(**written | ({"sampling": json.dumps(written["sampling"])} if "sampling" in written else {}))

    def request(self) -> Request:
        """Returns the request of the row. Raises ValueError, in one line, for an invalid row."""
        return read_request({name: value for name, value in self if value is not None})


def with_settings(png: bytes, settings: Mapping[str, Any]) -> bytes:
    """Returns the PNG with the settings before the pixels, whose bytes stay unchanged.
    Raises ValueError if it is no PNG."""
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR":
        raise ValueError("settings are kept in a PNG, and this is none")
    text = b"tEXt" + KEYWORD.encode() + b"\0" + json.dumps(settings).encode()  # ASCII
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return png[:HEADER] + chunk + png[HEADER:]


def read_settings(png: bytes) -> dict[str, Any] | None:
    """Returns the settings in a PNG; None for a PNG without settings.
    Raises ValueError, in one line, for no PNG or broken settings."""
    if not png.startswith(SIGNATURE):
        raise ValueError("this is not a PNG")
    try:
        text = open_header(png).info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("this PNG can't be read: it is damaged") from error
    if text is None:
        return None
    if len(text) > MOST_TEXT:
        raise ValueError(f"the PNG has settings of {len(text):,} characters, more than {MOST_TEXT:,}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the settings in the PNG are not JSON: another program wrote them") from error
    if not isinstance(settings, dict):
        raise ValueError("the settings in the PNG are not a JSON object: another program wrote them")
    return settings


def settings_of(request: Request, *, model: str, version: str | None) -> dict[str, Any]:
    """Returns the settings of a request for `request_of`, without the images.
    `model` is a registered name or the name of a folder: the image is shown to other people."""
    written = request.written()
    needs = [name for name in IMAGES if written.pop(name, None) is not None]
    origin = {"model": model} | ({} if version is None else {"version": version})
    return origin | written | ({"needs": needs} if needs else {})


def request_of(settings: Mapping[str, Any]) -> Request:
    """Returns the request of an image's settings, without the images that the request `needs`.
    Raises ValueError, in one line, for a setting that is unknown or no such value."""
    fields = {name: value for name, value in settings.items() if name not in NO_FIELDS and value is not None}
    unknown = [name for name in fields if name not in Request.model_fields or name in IMAGES]
    if unknown:
        raise ValueError(f"the PNG has settings that this version does not know: {', '.join(unknown)[:80]!r}")
    return read_request(fields, source="the PNG says ")
