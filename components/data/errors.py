"""What can be wrong with images, each as one clear line: the value, its place, and what to do."""


class SourceError(ValueError):
    """The source that the user named can't be used (missing, empty, without classes). Nothing has been written."""


class ShardError(RuntimeError):
    """A shard is not what its index says (truncated, changed, with members that are refused); names the shard."""


class TokensError(ValueError):
    """Tokens that don't fit what they are to be used with: another codebook, another grid, other images."""


class DataError(RuntimeError):
    """The images themselves are not fit for use: more of them are corrupt than the setting allows."""
