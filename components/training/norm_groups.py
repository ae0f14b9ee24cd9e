"""What all networks with group norms ask of their configurations; no torch."""

from collections.abc import Iterable


def check_norm_groups(norm_groups: int | None, channels: int, channel_mult: Iterable[float]) -> None:
    """Raise ValueError, naming the width, if the groups don't divide the channels of a level, channels * mult."""
    for mult in channel_mult:
        if norm_groups is not None and int(channels * mult) % norm_groups:
            raise ValueError(
                f"norm_groups {norm_groups} must divide the channels of every level, not {mult}x{channels}"
            )
