"""The one way that a configuration looks: frozen, complete, and closed to unknown fields."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen pydantic model that refuses fields it does not know (a typo never passes silently)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Part of a stage's key: raised when the same numbers give another result.
    stage_version: ClassVar[int] = 1
