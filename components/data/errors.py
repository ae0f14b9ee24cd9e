"""Errors of sources, shards and tokens, each a clear line: the value, its place, and the remedy."""

import re

ADDRESS = re.compile(r" <[^<>]* at 0x[0-9a-fA-F]+>| at 0x[0-9a-fA-F]+")  # Pillow names the object it could not read


class SourceError(ValueError):
    """A user's source can't be used (missing, empty, without classes). Nothing has been written."""


class ShardError(RuntimeError):
    """A shard differs from the index (truncated, changed, with refused members); names the shard."""


class TokensError(ValueError):
    """Tokens do not fit their use: another codebook, another grid, other images."""


class DataError(RuntimeError):
    """The images are not fit for use: more of them are corrupt than the setting allows."""


def reason_of(error: Exception) -> str:
    """The reason why an image can't be drawn, for the index: without addresses, equal in every process."""
    return f"{type(error).__name__}: {ADDRESS.sub('', str(error))[:120]}"
