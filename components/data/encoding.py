"""Encoding of image shards as token shards by the autoencoder of an artifact.

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
from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION, ModelBundle, describe_bundle, load_bundle
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.kept_parts import write_part
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once


def open_autoencoder(artifact: Artifact) -> Autoencoder:
    """Loads the trained network, for a worker. Raises ValueError for a model of another kind."""
    with artifact.local_copy() as folder:
        return _checked(load_bundle(folder)).requires_grad_(False)


def describe_autoencoder(artifact: Artifact) -> Autoencoder:
    """Builds the network on the meta device, without weights, for the head.

    Raises ValueError for a model of another kind.
    """
    return _checked(describe_bundle(artifact.read(DESCRIPTION)))


def _checked(bundle: ModelBundle) -> Autoencoder:
    if not isinstance(bundle.module, Autoencoder):
        raise ValueError(f"an autoencoder is needed, not a model of kind {bundle.kind}")
    return bundle.module


class TokenEncoder:
    """A worker of the pool: reads a shard of images and writes the token file whole."""

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
    """File names in the order of the index, numbered: two folders may hold tars of the same name."""
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
    """Write the missing token files of a set; yields the number of files after each.

    Args:
        member: the member of each sample that is encoded.
        warn: as in `process_shards`.

    Raises ShardError for a shard that its index does not match.
    """
    make_encoder = partial(TokenEncoder, index.model_copy(update={"shards": ()}), tokenizer, files, member)
    return process_shards(make_encoder, index, token_names(index), files=files, resources=resources, warn=warn)
