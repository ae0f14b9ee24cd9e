"""Messages between the API and a model; all messages can be pickled."""

from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple, Protocol

from components.sampling.requests import Request

Trouble = Literal["invalid", "busy", "late"]  # the client's fault; too many images wait; the time is up


class ImageJob(NamedTuple):
    """Images of a call, all made by a single version of the model."""

    requests: tuple[Request, ...]
    partial_images: int = 0  # previews wanted of each image, where its generator shows its steps


class Partial(NamedTuple):
    """A preview: the clean image that the model predicts at a step."""

    image: int  # place of the request in its job
    number: int  # of the preview, from 0
    stage: str
    step: int  # denoising steps done in this stage, from 1
    png: bytes


class FinishedImage(NamedTuple):
    """A finished image."""

    image: int  # place of the request in its job
    png: bytes
    version: str  # of the model


class Refused(NamedTuple):
    """The last event of a refused job."""

    trouble: Trouble
    message: str  # one sentence for the user
    retry_after: int = 1  # seconds; of "busy" and "late"


Event = Partial | FinishedImage | Refused


class Taken(NamedTuple):
    """The first event of a job in a replica; for the API's side of the connection alone."""


class Unavailable(Exception):  # noqa: N818, no error of a programmer
    """A model without a live replica; worth another try.

    Its text is a sentence for the user.
    """


class GeneratorCard(NamedTuple):
    """A generator's description: options and limits of requests."""

    name: str
    title: str
    options: tuple[str, ...]  # fields of a request that it takes, next to label, prompt and seed
    classes: tuple[str, ...]  # names by id; empty where it knows none
    reads_prompts: bool
    shows_steps: bool  # whether it has previews
    width: int  # of its finished images, pixels
    height: int
    steps: int | None  # denoising steps where a request names none; None: it has none to choose
    most_steps: int | None
    sampling: dict[str, dict[str, Any]]  # stage -> its sampling settings where a request names none, plain values
    tasks: tuple[str, ...]  # of images to work on
    condition_side: int | None  # pixels of the image that it is conditioned on; None: on none


class Card(NamedTuple):
    """A served model's description."""

    name: str  # of the served model
    source: str  # as the user named it: models:/NAME@ALIAS, or the name of a folder
    version: str  # of the registered model
    created: int  # seconds since 1970
    generators: tuple[GeneratorCard, ...]  # in the order of preference
    refused: str = ""  # the version that the source names and that could not be loaded


class Backend(Protocol):
    """A model seen from the API, on any machine."""

    async def card(self) -> Card:
        """Returns the card of the current version."""
        ...

    def make(self, job: ImageJob) -> AsyncIterator[Event]:
        """Yields the events of a job: previews of an image in order, then the image; images interleave.

        Closing the iterator, or canceling the task that reads it, cancels the job.
        """
        ...
