"""Shards of images into shards of tokens.

Shapes: N samples of a shard, H W pixels, T tokens an image.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from einops import rearrange

from components.data.held_out import read_whole_shard
from components.data.pieces import WARN, Warn
from components.data.shard_files import ShardJob, process_shards
from components.data.shards import Member, ShardIndex
from components.data.tokens import TokenSet, token_name, write_tokens
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.autoencoders import open_autoencoder
from components.runtime.storage.kept_parts import write_part
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once


class TokenEncoder:
    """Reads a shard, writes its token file whole."""

    def __init__(self, index: ShardIndex, tokenizer: Artifact, files: Store, member: Member) -> None:
        self.index, self.files, self.member = index, files, member
        self.device = best_device()
        self.network = open_autoencoder(tokenizer)
        self.network.to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def __call__(self, job: ShardJob) -> None:
        samples = read_whole_shard(self.index, job.shard, resolution=self.network.resolution, member=self.member)
        size = most_at_once(self.network.resolution)
        starts = range(0, len(samples.key), size)
        tokens = np.concatenate([self.encode(samples.image[start : start + size]) for start in starts])
        split = np.array(samples.split, dtype=str)
        data = write_tokens(TokenSet(samples.key, tokens, samples.label, samples.text, split))
        write_part(self.files, job.name, job.name, data)

    def encode(self, pixels: np.ndarray) -> np.ndarray:  # (N, H, W, 3) uint8 -> (N, T) int64
        image = from_uint8(torch.from_numpy(pixels).to(self.device))
        return rearrange(self.network.tokenize(image), "n h w -> n (h w)").cpu().numpy()


def token_names(index: ShardIndex) -> list[str]:
    """File names in the order of the index; numbered, since two folders may hold tars of one name."""
    return [f"{number:06d}-{token_name(shard.url)}" for number, shard in enumerate(index.shards)]


def encode_shards(
    index: ShardIndex,
    tokenizer: Artifact,
    *,
    files: Store,
    resources: Resources,
    member: Member = "image",
    warn: Warn = WARN,
) -> Iterator[int]:
    """Write the token files of all shards that are not there; yields how many there are after each.

    Args:
        member: what of each sample is its image.
        warn: as of `process_shards`.

    Raises ShardError for a shard that its index does not match.
    """
    make_encoder = partial(TokenEncoder, index.model_copy(update={"shards": ()}), tokenizer, files, member)
    return process_shards(make_encoder, index, token_names(index), files=files, resources=resources, warn=warn)
