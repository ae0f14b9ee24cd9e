"""What can be wrong with images, each as one clear line: the value, its place, and what to do."""

import re

ADDRESS = re.compile(r" <[^<>]* at 0x[0-9a-fA-F]+>| at 0x[0-9a-fA-F]+")  # Pillow names the object that it was given


class SourceError(ValueError):
    """The source that the user named can't be used (missing, empty, without classes). Nothing has been written."""


class ShardError(RuntimeError):
    """A shard is not what its index says (truncated, changed, with members that are refused); names the shard."""


class TokensError(ValueError):
    """Tokens that don't fit what they are to be used with: another codebook, another grid, other images."""


class DataError(RuntimeError):
    """The images themselves are not fit for use: more of them are corrupt than the setting allows."""


def reason_of(error: Exception) -> str:
    """Why an image can't be drawn, in one form for the index: the same in every process, so without an address."""
    return f"{type(error).__name__}: {ADDRESS.sub('', str(error))[:120]}"
