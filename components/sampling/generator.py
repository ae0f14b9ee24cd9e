"""The interface of generators: from a request to an image by a set of models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor

from components.configuration.conditions import Member
from components.models.diffusion import samplers
from components.sampling.frozen_text import ContrastiveText, FrozenText
from components.sampling.model import SamplingModel
from components.sampling.plan import Given, Plan, check_conditions, plan_of
from components.sampling.requests import Request, request_options

Look = Callable[[], Tensor]  # decodes latents: only who looks at a step waits for that
OnStep = Callable[[str, int, float, Look, Look], None]  # (stage, step from 0, time, x_t, clipped x_0)
Between = Callable[[], None]


class Hooks(NamedTuple):
    """Callbacks during sampling. An exception in a callback ends the sampling."""

    on_step: OnStep | None = None  # of denoising, with what is made on the way
    between: Between | None = None  # between batches, denoising steps, tokens and values

    def each(self, *values: object) -> None:
        """Calls `between`, for samplers, which give arguments."""
        if self.between is not None:
            self.between()

    def of_stage(self, stage: str, image: Callable[[Tensor], Tensor] = lambda image: image) -> samplers.OnStep:
        """Merges both callbacks for a stage's sampler; `image` turns its values into images (B, 3, H, W)."""

        def shown(step: int, time: float, x_t: Tensor, x_0: Tensor) -> None:
            if self.on_step is not None:
                self.on_step(stage, step, time, partial(image, x_t), partial(image, x_0))
            self.each()

        return shown


class ConditionImages(NamedTuple):
    """The kind and size of a request's condition image."""

    resolution: int
    member: Member  # what of a sample it was in training
    classes: int = 0  # of a map; 0: an image


@dataclass(frozen=True)
class Parts:
    """The models of a cascade by role, in fp32; None for absent models."""

    tokenizer: SamplingModel | None = None
    prior: SamplingModel | None = None
    condition: SamplingModel | None = None  # tokenizer of the images that the prior is conditioned on
    reranker: SamplingModel | None = None  # contrastive encoder that chooses among the prior's images
    base: SamplingModel | None = None
    autoencoder: SamplingModel | None = None  # decoder of a base that makes latents
    contrastive: ContrastiveText | None = None  # reads prompts for the base (Imagen) or the diffusion prior (DALL-E 2)
    text_encoder: FrozenText | None = None  # the same, pretrained elsewhere
    diffusion_prior: SamplingModel | None = None
    classifier: SamplingModel | None = None  # of noisy images; guides the base
    weaker: SamplingModel | None = None  # smaller or less trained; guides the base (autoguidance)
    upsamplers: tuple[SamplingModel, ...] = ()
    model: SamplingModel | None = None  # makes images by itself: PixelCNN, PixelRNN, GAN, VAE, image-to-image


class Generator(ABC):
    """A kind of generator. A new kind is a class, and a line in `GENERATORS` of `cascade.py`."""

    name: ClassVar[str]  # as requests choose it
    title: ClassVar[str]  # as the report has it
    options: ClassVar[tuple[str, ...]]  # of a request; where the class names none, those whose `Option` names it
    shows_steps: ClassVar[bool] = False  # whether `make` calls hooks.on_step

    def __init_subclass__(cls) -> None:
        """Read the names of the generator's options from the fields of the request."""
        if "options" not in cls.__dict__:
            cls.options = tuple(name for name, option in request_options().items() if cls.name in option.generators)

    def __init__(self, parts: Parts) -> None:
        """Raises ValueError, in one line, if the models don't fit each other."""
        first = self.first_of(parts)
        assert first is not None
        self.parts, self.first = parts, first

    @classmethod
    @abstractmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        """The first model, whose conditions requests may name; None if the parts make no such generator."""

    @property
    def models(self) -> tuple[SamplingModel, ...]:
        """The models with settings that a request may change, by their stages' names."""
        return (self.first,)

    @property
    def sides(self) -> list[int]:
        """Resolutions of the models' inputs, which decide the largest batch size."""
        return [self.first.settings.get("resolution") or 1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a finished image where the request names none, pixels."""
        return self.sides[-1], self.sides[-1]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks on a request's image; empty for a generator that takes no image."""
        return ()

    @property
    def classes(self) -> list[str]:
        """Names of the classes for requests, by id."""
        return self.first.classes

    @property
    def condition_images(self) -> ConditionImages | None:
        """The size and kind of the condition images; None for a generator without condition images."""
        return None

    def resolve(self, request: Request) -> Plan:
        """The plan of a request whose options the generator takes. Raises ValueError if it can't be met."""
        check_conditions(self.first, request)
        return self.plan_of(request)

    def plan_of(self, request: Request, *, given: Given | None = None) -> Plan:
        """The plan of a request whose conditions were checked. Raises ValueError for settings out of range."""
        return plan_of(request, self.models, self.classes, generator=self.name, given=given)

    @abstractmethod
    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Makes the images (B, 3, H, W) of each stage for plans of one way, the finished images last."""

    def example(self) -> Request:
        """An example request for the generator."""
        if self.classes:
            return Request(label="0", seed=1, generator=self.name)
        return Request(prompt="red" if self.first.reads_prompts else None, seed=1, generator=self.name)
