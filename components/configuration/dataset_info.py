"""Facts about a data set, known to a training before the first sample is read."""

from pydantic import Field

from components.configuration.config import Config


class TokenGrid(Config):
    """Codebook size and shape of an image's grid of tokens."""

    codebook_size: int = Field(ge=2)
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class DatasetInfo(Config):
    """Conditions of a data set with their sizes, read from the set's index."""

    num_classes: int = Field(ge=1)
    vocab_size: int = Field(0, ge=0)  # of the BPE; 0: no captions
    text_length: int = Field(0, ge=0)
    condition: TokenGrid | None = None  # of the condition images, where there are any
    image_embedding_dim: int = Field(0, ge=0)  # sizes of frozen encoders' arrays; this and the next two
    text_states_dim: int = Field(0, ge=0)
    text_states_length: int = Field(0, ge=0)


IMAGES = DatasetInfo(num_classes=1)  # a set of which nothing but the images matters
