"""Gray images: stored with three equal channels, learned as one.

Shapes: B images, H W pixels.
"""

from torch import Tensor

from components.sampling.images import to_uint8


class ColorError(ValueError):
    """An image in color where a model has one channel."""


def one_channel(images: Tensor) -> Tensor:
    """The channel (B, 1, H, W) that all three of gray images (B, 3, H, W) are.

    Raises ColorError, which names the first pixel whose channels differ.
    """
    differs = (images != images[:, :1]).any(dim=1)  # (B, H, W)
    if images.is_meta or not differs.any():  # without numbers there is nothing to check
        return images[:, :1].contiguous()
    image, row, column = differs.nonzero()[0].tolist()
    color = ", ".join(map(str, to_uint8(images[image, :, row, column].reshape(1, 3, 1, 1)).flatten().tolist()))
    raise ColorError(
        f"image {image} of a batch has the color ({color}) in row {row}, column {column}, and a model of one channel "
        "learns gray images alone: set in_channels=3"
    )
