"""Settings of a service: models, limits and replicas."""

import ipaddress
import math
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROOM_TO_REFUSE = 16  # calls more than a replica can take: it says itself that it is busy


class Settings(BaseModel):
    """Frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServedModel(Settings):
    """A model by the name that clients choose it by."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)  # models:/NAME@ALIAS, models:/NAME/VERSION, or a folder


class Limits(Settings):
    """Bounds of one request, and of the work that may wait."""

    body_bytes: int = Field(16 * 2**20, ge=1024)
    body_seconds: float = Field(60, gt=0)  # for a body to come whole
    body_pause_seconds: float = Field(10, gt=0)  # between two pieces of a body
    bodies: int = Field(256, ge=1)  # read at a time; the longest silent one gives way
    bodies_bytes: int = Field(2**29, ge=1024)  # of those together
    image_pixels: int = Field(2**24, ge=1)  # of an uploaded image
    decoding_bytes: int = Field(2**30, ge=2**28)  # memory of a process that decodes uploads
    decoding_seconds: float = Field(15, gt=0)  # of a request's uploads
    prompt_characters: int = Field(4000, ge=1)
    images: int = Field(16, ge=1)  # n
    steps: int = Field(1000, ge=1)
    candidates: int = Field(16, ge=1)  # best_of
    output_pixels: int = Field(2**20, ge=1)
    partial_images: int = Field(16, ge=0)  # OpenAI's own limit is 3
    waiting_images: int = Field(64, ge=1)  # of a replica, without those that are being made
    key_waiting_images: int = Field(32, ge=1)  # of one API key, of those
    key_images_minute: float | None = Field(None, gt=0)  # that one API key may ask for; None: any
    seconds: float = Field(300, gt=0)  # from arrival to the last image

    @model_validator(mode="after")
    def _one_fits(self) -> Self:
        if self.bodies_bytes < self.body_bytes:
            raise ValueError(f"bodies_bytes must be at least body_bytes, {self.body_bytes}, not {self.bodies_bytes}")
        return self


class ServiceSettings(Settings):
    """A service: its models, limits and replicas."""

    models: tuple[ServedModel, ...] = Field(min_length=1)
    tracking: str | None = None  # MLflow's address; None: no registry, sources are folders
    limits: Limits = Limits()
    keys_required: bool = False  # on any address but loopback, and where the command that starts it has some
    batch_images: int = Field(16, ge=1)
    poll_seconds: float = Field(5, gt=0)  # between looks at what an alias names
    api_replicas: int = Field(1, ge=1)  # processes for HTTP
    min_replicas: int = Field(1, ge=1)  # of each model
    max_replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)  # of a replica
    gpus: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        names = [model.name for model in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two models are called {twice}: name them with NAME=SOURCE")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas must be at least {self.min_replicas}, not {self.max_replicas}")
        return self

    @property
    def replica_calls(self) -> int:
        """Jobs that a replica holds: Serve's own limit of 5 would leave no batch more than five of them."""
        return self.limits.waiting_images + self.batch_images + ROOM_TO_REFUSE

    @property
    def calls(self) -> int:
        """Requests for images at a time in a process for HTTP: an even part of the models' places."""
        return math.ceil(self.max_replicas * self.replica_calls * len(self.models) / self.api_replicas)


def is_loopback(host: str) -> bool:
    """Returns whether a Host header names this machine for local programs."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
