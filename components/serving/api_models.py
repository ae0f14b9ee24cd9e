"""Requests of clients: OpenAI's image API, with this project's options as further fields."""

import json
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, create_model, field_validator

from components.sampling.requests import Request, plain_options, plain_type
from components.serving.errors import ServiceError
from components.serving.messages import Card, GeneratorCard, ImageJob
from components.serving.settings import Limits
from components.serving.uploads import GivenImages


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


def option_fields() -> dict[str, Any]:
    """Returns the API's fields of single-valued options, as arguments of `pydantic.create_model`.

    These are options of a single number or word.
    """
    fields: dict[str, Any] = {}
    for name, option in plain_options().items():
        kind: Any = plain_type(Request.model_fields[name])
        words = option.description or option.help
        about = Field(None, ge=option.ge, gt=option.gt, le=option.le, description=words)
        fields[name] = ((Name if kind is str else kind) | None, about)
    return fields


_Options: Any = create_model("_Options", __base__=OpenAIFields, **option_fields())


class Generation(_Options):
    """Images of a prompt or a class."""

    sampling: dict[str, dict[str, Value]] | None = None
    """Any sampling setting of any stage: {"upsampler_64": {"noise_level": 20}}."""
    condition: Text | None = None
    """base64 of the image that the model is conditioned on, such as a depth map."""


class Edit(Generation):
    """The same of an image, as the fields of a form; image and mask are its files."""

    model_config = ConfigDict(strict=False)  # a form holds text alone

    task: Name | None = None
    """inpainting, uncropping, colorization, jpeg or super_resolution; inpainting where there is a mask."""
    input_fidelity: Literal["high", "low"] | None = None
    """Accepted and not looked at."""

    @field_validator("sampling", mode="before")
    @classmethod
    def _of_text(cls, value: object) -> object:
        """Parses JSON, or the values of separate form fields."""
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(f"must be JSON, not {value!r:.60}") from None
        return value


Asked = Generation | Edit


def check_limits(asked: Asked, limits: Limits) -> None:
    """Raises ServiceError for a request beyond the limits, and for fields that exclude each other."""
    most = {"n": limits.images, "steps": limits.steps, "best_of": limits.candidates}
    most |= {"partial_images": limits.partial_images}
    for name, limit in most.items():
        value = getattr(asked, name)
        if value is not None and value > limit:
            raise ServiceError(400, f"{name} must be at most {limit} here, not {value}", param=name)
    if len(asked.prompt or "") > limits.prompt_characters:
        message = f"prompt must have at most {limits.prompt_characters} characters, not {len(asked.prompt or '')}"
        raise ServiceError(400, message, param="prompt")
    if (size := size_of(asked)) and size[0] * size[1] > limits.output_pixels:
        message = f"size must have at most {limits.output_pixels} pixels here, not {asked.size}"
        raise ServiceError(400, message, param="size")
    for stage, settings in (asked.sampling or {}).items():
        for name, value in settings.items():
            _check_setting(f"sampling.{stage}.{name}", name, value, limits)
    if asked.partial_images and not asked.stream:
        raise ServiceError(400, "partial_images are sent in a stream: set stream to true", param="partial_images")
    if (asked.output_format or "png") == "png" and asked.output_compression not in (None, 100):
        message = "output_compression is for jpeg and webp: set output_format, or leave it out"
        raise ServiceError(400, message, param="output_compression")


def _check_setting(place: str, name: str, value: Value, limits: Limits) -> None:
    """Checks a setting that decides the amount of work.

    Only whole numbers pass a limit.
    """
    limit = getattr(limits, LIMITED[name]) if name in LIMITED else None
    if limit is not None and (type(value) is not int or value > limit):
        message = f"{place:.80} must be a whole number of at most {limit} here, not {value!r:.40}"
        raise ServiceError(400, message, param="sampling")


def size_of(asked: Asked) -> tuple[int, int] | None:
    """Width and height, pixels."""
    found = SIZE.fullmatch(asked.size or "")
    return None if found is None else (int(found[1]), int(found[2]))


def generator_of(asked: Asked, card: Card, *, on_images: bool) -> GeneratorCard:
    """Returns the requested generator, else the first suitable generator.

    Raises ServiceError if no generator is suitable.

    Args:
        on_images: whether it has an image to work on.
    """
    able = [each for each in card.generators if not on_images or each.tasks]
    if not able:
        raise ServiceError(400, f"model {card.name} works on no images: ask /v1/images/generations", param="model")
    if asked.generator is None:
        return able[0]
    for each in able:
        if each.name == asked.generator:
            return each
    there, what = " and ".join(each.name for each in able), "to work on images" if on_images else ""
    message = f"model {card.name} has no generator {asked.generator!r} {what}".rstrip() + f"; it has {there}"
    raise ServiceError(400, message, param="generator")


def check_options(asked: Asked, generator: GeneratorCard) -> None:
    """Raise ServiceError for options that the generator does not take."""
    for name in (*OPTIONS, "condition"):
        if getattr(asked, name) is not None and name not in generator.options:
            takes = ", ".join(option for option in generator.options if option in OPTIONS) or "none of its kind"
            message = f"the {generator.name} generator takes no {name}: leave it out, or choose of {takes}"
            raise ServiceError(400, message, param=name)
    if prompt_of(asked) is not None and not generator.reads_prompts:
        remedy = "give a label" if generator.classes else "leave the prompt empty"
        raise ServiceError(400, f"this model reads no prompts: {remedy}", param="prompt")
    size, own = size_of(asked), (generator.width, generator.height)
    if size is not None and size != own and "size" not in generator.options:
        wanted = f"ask for auto or {own[0]}x{own[1]}"
        message = f"the {generator.name} generator makes no images of {size[0]}x{size[1]}: {wanted}"
        raise ServiceError(400, message, param="size")


def prompt_of(asked: Asked) -> str | None:
    prompt = asked.prompt or ""
    return prompt if prompt.strip() else None


def job_of(asked: Asked, generator: GeneratorCard, given: GivenImages) -> ImageJob:
    """Returns the job of a request, checked against the card, with a random seed if none is set.

    Raises ServiceError for what the generator does not take.
    """
    check_options(asked, generator)
    size, own = size_of(asked), (generator.width, generator.height)
    seed = secrets.randbelow(DRAWN_SEEDS) if asked.seed is None else asked.seed
    request = Request(
        label=asked.label,
        prompt=prompt_of(asked),
        generator=generator.name,
        size=None if size is None or size == own else (size[1], size[0]),
        sampling=asked.sampling or {},
        image=given.image,
        mask=given.mask,
        condition=given.condition,
        task=task_of(asked, generator, given) if isinstance(asked, Edit) else None,
        **{name: getattr(asked, name) for name in OPTIONS},
    )
    requests = tuple(request.replace(seed=seed + number) for number in range(asked.n or 1))
    return ImageJob(requests, (asked.partial_images or 0) if generator.shows_steps else 0)


def task_of(asked: Edit, generator: GeneratorCard, given: GivenImages) -> str | None:
    """Returns the requested task; with a mask `inpainting`, which OpenAI's clients can't name."""
    if asked.task is not None and asked.task not in generator.tasks:
        can = ", ".join(generator.tasks)
        raise ServiceError(
            400, f"the {generator.name} generator has no task {asked.task!r}: choose {can}", param="task"
        )
    return asked.task or ("inpainting" if given.mask and "inpainting" in generator.tasks else None)
