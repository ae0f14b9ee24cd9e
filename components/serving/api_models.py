"""Requests of clients: OpenAI's image API, with this project's options as further fields."""

import base64
import json
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    create_model,
    field_validator,
    model_validator,
)

from components.configuration.sampling import LARGEST, SMALLEST
from components.sampling.requests import Request, plain_options, plain_type
from components.serving.messages import COSTLY, Card, GeneratorCard, ImageJob, check_json, invalid
from components.serving.settings import Limits


def is_text(value: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can carry and UTF-8 can't encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be Unicode, without halves of surrogate pairs") from None
    return value


Text = Annotated[str, AfterValidator(is_text)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Value = bool | int | float | Text | list[float] | None
SEED = 2**63 - 1
DRAWN_SEEDS = 2**31  # a seed that is drawn at random is one that any language's numbers can hold
SETTING = re.compile(r"sampling\[(\w+)\]\[(\w+)\]")
SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
OPTIONS = tuple(plain_options())  # of a request; clients write them as it has them
LIMITED = {"num_inference_steps": "steps", "candidates": "candidates"}  # settings of stages -> their limit


class OpenAIFields(BaseModel):
    """OpenAI's own fields, and what an image is of. A number is no text, and an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    prompt: Text | None = None
    """What the image shows. Empty for none, where a label says enough or the model knows no condition."""
    model: Name | None = None
    """A served model; may be left out where there is one."""
    n: int | None = Field(None, ge=1)
    """Images, 1 where it is left out. Image i, from 0, has the seed `seed` + i."""
    size: Name | None = None
    """auto, or WIDTHxHEIGHT in pixels; another than the generator's own where it takes sizes."""
    stream: bool | None = None
    """Whether to send server-sent events."""
    partial_images: int | None = Field(None, ge=0)
    """Previews of each image while it is made, of a stream; a generator that makes an image at once has none."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    """png where it is left out; the settings of an image are in its PNG alone."""
    output_compression: int | None = Field(None, ge=0, le=100)
    """Quality of jpeg and webp, 100 where it is left out."""
    background: Literal["opaque", "auto"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    """Accepted and not looked at, as are the next five: `steps` is what changes quality here."""
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    user: str | None = None
    safety_identifier: str | None = None

    seed: int | None = Field(None, ge=-SEED, le=SEED)
    """Drawn at random and told in the answer where it is left out."""
    label: StrictInt | Annotated[StrictStr, AfterValidator(is_text), Field(max_length=200)] | None = None
    """A class by its name or its number."""
    generator: Name | None = None
    """One of the model's generators; the first that can where it is left out."""

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is None or value == "auto" or SIZE.fullmatch(value):
            return value
        raise ValueError(f"must be auto or WIDTHxHEIGHT in pixels, such as 64x64, not {value!r:.60}")


def option_field(name: str) -> Any:
    """The API's field of an option that is a single number or word, as `pydantic.create_model` takes it."""
    kind, option = plain_type(Request.model_fields[name]), plain_options()[name]
    words = option.description or option.help
    about = Field(None, ge=option.ge, gt=option.gt, le=option.le, description=words)
    return ((Name if kind is str else kind) | None, about)


_Options: Any = create_model("_Options", __base__=OpenAIFields, **{name: option_field(name) for name in OPTIONS})


class Generation(_Options):
    """Images of a prompt or a class."""

    sampling: dict[str, dict[str, Value]] | None = None
    """Any sampling setting of any stage: {"upsampler_64": {"noise_level": 20}}."""
    condition: Text | None = None
    """base64 of the image that the model is conditioned on, such as a depth map."""


class EditForm(Generation):
    """An edit as a form: texts, and images as files."""

    model_config = ConfigDict(strict=False)  # a form holds text alone

    task: Name | None = None
    """inpainting, uncropping, colorization, jpeg or super_resolution; inpainting where there is a mask."""
    input_fidelity: Literal["high", "low"] | None = None
    """Accepted and not looked at."""
    image: UploadFile = Field(validation_alias=AliasChoices("image", "image[]"))  # OpenAI's clients send lists of one
    mask: UploadFile | None = None
    """Of the image's size: transparent where it is to be made, or white if nothing is."""
    condition: UploadFile | Text | None = None  # pyrefly: ignore[bad-override]

    @field_validator("sampling", mode="before")
    @classmethod
    def _of_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        check_json(value.encode())
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"must be JSON, not {value!r:.60}") from None

    @model_validator(mode="before")
    @classmethod
    def _with_stages(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Collects the fields sampling[STAGE][SETTING], the form of nested values in clients."""
        stages: dict[str, dict[str, Any]] = {}
        for name, text in fields.items():
            if (setting := SETTING.fullmatch(name)) and text:
                stages.setdefault(setting[1], {})[setting[2]] = plain(text)
        if stages and "sampling" in fields:
            raise invalid("sampling", "sampling is given as JSON and as fields: give it once")
        others = {name: value for name, value in fields.items() if not SETTING.fullmatch(name)}
        return others | ({"sampling": stages} if stages else {})


def plain(text: str) -> Any:
    """Returns a number, true, false, null or a list if the text is such JSON, else the text."""
    check_json(text.encode())
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def decoded(name: str, text: str) -> bytes:
    """Decodes an image of a JSON body, from base64 or a data: address. Raises ServiceError."""
    try:
        return base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", text), validate=True)
    except ValueError:
        raise invalid(name, f"{name} must be an image in base64, and is not base64") from None


def check_limits(asked: Generation, limits: Limits) -> None:
    """Raises ServiceError for a request beyond the limits, and for fields that exclude each other."""
    most = {"n": limits.images, "steps": limits.steps, "best_of": limits.candidates}
    most |= {"partial_images": limits.partial_images}
    for name, limit in most.items():
        value = getattr(asked, name)
        if value is not None and value > limit:
            raise invalid(name, f"{name} must be at most {limit} here, not {value}")
    if (length := len(asked.prompt or "")) > limits.prompt_characters:
        raise invalid("prompt", f"prompt must have at most {limits.prompt_characters} characters, not {length}")
    if (size := size_of(asked)) and size[0] * size[1] > limits.output_pixels:
        raise invalid("size", f"size must have at most {limits.output_pixels} pixels here, not {asked.size}")
    settings = {(stage, name): value for stage, own in (asked.sampling or {}).items() for name, value in own.items()}
    for (stage, name), value in settings.items():
        place, limit = f"sampling.{stage}.{name}", getattr(limits, LIMITED.get(name, ""), None)
        if name in COSTLY and value:
            raise invalid("sampling", f"{place:.80} costs minutes, and is not a client's to set: leave it out")
        if limit is not None and (type(value) is not int or value > limit):
            message = f"{place:.80} must be a whole number of at most {limit} here, not {value!r:.40}"
            raise invalid("sampling", message)
    numbers = {name: getattr(asked, name) for name in OPTIONS}
    numbers |= {f"sampling.{stage}.{name}": value for (stage, name), value in settings.items()}
    for place, value in numbers.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and each and not SMALLEST <= abs(each) <= LARGEST:
                message = f"{place:.80} must be of a size from {SMALLEST:g} to {LARGEST:g}, not {each!r:.40}"
                raise invalid(place.partition(".")[0], message)
    if asked.partial_images and not asked.stream:
        raise invalid("partial_images", "partial_images are sent in a stream: set stream to true")
    if (asked.output_format or "png") == "png" and asked.output_compression not in (None, 100):
        message = "output_compression is for jpeg and webp: set output_format, or leave it out"
        raise invalid("output_compression", message)


def size_of(asked: Generation) -> tuple[int, int] | None:
    """Width and height, pixels."""
    size = SIZE.fullmatch(asked.size or "")
    return None if size is None else (int(size[1]), int(size[2]))


def generator_of(asked: Generation, card: Card, *, on_images: bool) -> GeneratorCard:
    """Returns the requested generator, else the first; of those that work on images the one of most tasks.
    Raises ServiceError for none."""
    generators = sorted(card.generators, key=lambda each: -len(each.tasks)) if on_images else card.generators
    able = {each.name: each for each in generators if not on_images or each.tasks}
    if not able:
        raise invalid("model", f"model {card.name} works on no images: ask /v1/images/generations")
    if (name := asked.generator or next(iter(able))) in able:
        return able[name]
    there, what = " and ".join(able), " to work on images" if on_images else ""
    raise invalid("generator", f"model {card.name} has no generator {name!r}{what}; it has {there}")


def job_of(asked: Generation, generator: GeneratorCard, given: Mapping[str, bytes]) -> ImageJob:
    """Returns the job of a request, with a random seed if none is set.
    Raises ServiceError for options that the generator does not take."""
    for name in (*OPTIONS, "condition"):
        if getattr(asked, name) is not None and name not in generator.options:
            takes = ", ".join(option for option in generator.options if option in OPTIONS) or "none of its kind"
            raise invalid(name, f"the {generator.name} generator takes no {name}: leave it out, or choose of {takes}")
    if (asked.prompt or "").strip() and not generator.reads_prompts:
        remedy = "give a label" if len(generator.classes) > 1 else "leave the prompt empty"
        raise invalid("prompt", f"this model reads no prompts: {remedy}")
    size, own = size_of(asked), (generator.width, generator.height)
    if size not in (None, own) and "size" not in generator.options:
        remedy = f"ask for auto or {own[0]}x{own[1]}"
        raise invalid("size", f"the {generator.name} generator makes no images of {asked.size}: {remedy}")
    task = getattr(asked, "task", None)
    if task is not None and task not in generator.tasks:
        can = ", ".join(generator.tasks)
        raise invalid("task", f"the {generator.name} generator has no task {task!r}: choose {can}")
    if "mask" in given and "inpainting" in generator.tasks:
        task = task or "inpainting"  # which OpenAI's clients can't name
    seed = secrets.randbelow(DRAWN_SEEDS) if asked.seed is None else asked.seed
    request = Request(
        label=asked.label,
        prompt=asked.prompt if (asked.prompt or "").strip() else None,
        generator=generator.name,
        size=None if size is None or size == own else (size[1], size[0]),
        sampling=asked.sampling or {},
        task=task,
        **given,
        **{name: getattr(asked, name) for name in OPTIONS},
    )
    requests = tuple(request.replace(seed=seed + number) for number in range(asked.n or 1))
    return ImageJob(requests, (asked.partial_images or 0) if generator.shows_steps else 0)
