"""What a training must know of its data before it reads any."""

from pydantic import Field

from components.configuration.config import Config


class TokenGrid(Config):
    """What a tokenizer makes of an image."""

    codebook_size: int = Field(ge=2)
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class DatasetInfo(Config):
    """What a data set can condition on; from its index."""

    num_classes: int = Field(ge=1)
    vocab_size: int = Field(0, ge=0)  # of the BPE; 0: no captions
    text_length: int = Field(0, ge=0)
    condition: TokenGrid | None = None  # of the condition images, where there are any
    image_embedding_dim: int = Field(0, ge=0)  # what frozen encoders make, where there are any; this and the next two
    text_states_dim: int = Field(0, ge=0)
    text_states_length: int = Field(0, ge=0)


IMAGES = DatasetInfo(num_classes=1)  # a set of which nothing but the images matters
