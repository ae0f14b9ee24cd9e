"""What every kind of generator is: a way from a request to an image, made of the models that it needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from components.configuration.conditions import Member
from components.models.diffusion import samplers
from components.sampling.frozen_text import ContrastiveText, FrozenText
from components.sampling.model import SamplingModel, reads_prompts
from components.sampling.plan import Given, Plan, check_conditions, plan_of
from components.sampling.requests import Request, request_options

OnStep = Callable[[str, int, float, Tensor, Tensor], None]  # (stage, step from 0, time, x_t, clipped x_0)
Between = Callable[[], None]


class Hooks(NamedTuple):
    """Who is told while images are made; what is None costs nothing. What either raises ends the sampling."""

    on_step: OnStep | None = None  # of denoising, with what is made on the way
    between: Between | None = None  # between batches, denoising steps, tokens and values

    def of_stage(self, stage: str, image: Callable[[Tensor], Tensor] = lambda image: image) -> samplers.OnStep | None:
        """Both for the sampler of a stage, which makes what `image` turns into images (B, 3, H, W)."""
        on_step, between = self
        if on_step is None:
            return after_each(between)

        def shown(step: int, time: float, x_t: Tensor, x_0: Tensor) -> None:
            on_step(stage, step, time, image(x_t), image(x_0))
            if between is not None:
                between()

        return shown


def after_each(between: Between | None) -> Callable[..., None] | None:
    """`between` for a sampler that says more of each step or token."""
    if between is None:
        return None

    def told(*values: object) -> None:
        del values
        between()

    return told


class ConditionImages(NamedTuple):
    """What a request's condition image is."""

    resolution: int
    member: Member  # what of a sample it was in training


@dataclass(frozen=True)
class Parts:
    """The models of a cascade by what they are in it, in fp32; None for those that are not there."""

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
    """One kind of generator. A new one is a file with its class, and a line in `generators/kinds.py`."""

    name: ClassVar[str]  # as requests choose it
    title: ClassVar[str]  # as the report has it
    options: ClassVar[tuple[str, ...]]  # of a request; where the class names none, those whose `Option` names it
    shows_steps: ClassVar[bool] = False  # whether `sample` tells hooks.on_step what it makes on the way

    def __init_subclass__(cls) -> None:
        """Read from the request's fields which of them the generator takes."""
        if "options" not in cls.__dict__:
            cls.options = tuple(name for name, option in request_options().items() if cls.name in option.generators)

    def __init__(self, parts: Parts) -> None:
        """Raises ValueError, in one line, if its models don't fit each other."""
        first = self.first_of(parts)
        assert first is not None
        self.parts, self.first = parts, first

    @classmethod
    @abstractmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        """The model that it starts with, whose conditions requests may name; None if there is no such generator."""

    @property
    def models(self) -> tuple[SamplingModel, ...]:
        """Those whose sampling settings a request may change, by the names of their stages."""
        return (self.first,)

    @property
    def sides(self) -> list[int]:
        """Resolutions of what its models work on, which decide how large a batch may be."""
        return [self.first.settings.get("resolution") or 1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a finished image where the request names none, pixels."""
        return self.sides[-1], self.sides[-1]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it does to a request's image; none where it takes no image."""
        return ()

    @property
    def classes(self) -> list[str]:
        """Names of the classes that requests may ask for, by id."""
        return self.first.classes

    @property
    def condition_images(self) -> ConditionImages | None:
        """What images it is conditioned on; None if on none."""
        return None

    def resolve(self, request: Request) -> Plan:
        """Returns the plan of a request whose options it takes. Raises ValueError, in one line, if it can't make it."""
        check_conditions(self.first, request)
        return self.plan_of(request)

    def plan_of(self, request: Request, *, given: Given | None = None) -> Plan:
        """Returns the plan of a request whose conditions were checked. Raises ValueError for settings out of range."""
        return plan_of(request, self.models, self.classes, generator=self.name, given=given)

    @abstractmethod
    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Images (B, 3, H, W) of each stage, the finished ones last, for plans that are of one way."""

    def example(self) -> Request:
        """A request that it can meet."""
        if self.classes:
            return Request(label="0", seed=1, generator=self.name)
        return Request(prompt="red" if reads_prompts(self.first) else None, seed=1, generator=self.name)
