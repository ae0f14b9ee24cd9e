"""The one way that a configuration looks: frozen, complete, and closed to unknown fields."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from components.configuration.leaves import assign

IDENTITY = "identity"  # context of the dump that enters a stage's key: without what changes no result


class Config(BaseModel):
    """A frozen pydantic model that refuses fields it does not know (a typo never passes silently).

    Its parts are configurations too. Where a part is one of several kinds, its field `kind` says which, and each kind
    has only its own fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Part of a stage's key: raised when the same numbers give another result.
    stage_version: ClassVar[int] = 1

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The configuration with these values, each named as in `assign`: `total_steps=100` wherever that stands.

        Raises ValueError for a name that is not there or stands in several places.
        """
        return cls.model_validate(assign(cls, {}, values))

    def replace(self, **values: Any) -> Self:
        """A copy with other values, named as in `of`; checked again."""
        return self.model_validate(assign(type(self), self.model_dump(), values))
