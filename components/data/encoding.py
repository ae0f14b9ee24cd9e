"""Shards of pictures into shards of tokens: an actor pool of Ray Data with one copy of the tokenizer in each actor.

Shapes: N samples of a shard, H W pixels, T tokens a picture.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import ray.data
import torch
from einops import rearrange

from components.data.held_out import read_whole_shard
from components.data.shards import Member, ShardEntry, ShardIndex
from components.data.tokens import TokenSet, token_name, write_tokens
from components.execution import Resources
from components.models.autoencoder import Autoencoder
from components.storage.artifact import Artifact
from components.storage.bundle import load_bundle
from components.storage.store import Store

BATCH = 64  # pictures at a time; decides no token


class ShardEncoder:
    """One actor of the pool: reads a shard, writes its token file whole under its fixed name."""

    def __init__(self, index: ShardIndex, tokenizer: Artifact, files: Store, threads: int, member: Member) -> None:
        torch.set_num_threads(threads)
        bundle = load_bundle(tokenizer.download(Path(tempfile.mkdtemp(prefix="cascade-tokenizer-"))))
        self.index, self.files, self.member, self.resolution = index, files, member, bundle.settings["resolution"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        assert isinstance(bundle.module, Autoencoder)
        self.network = bundle.module
        self.network.to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        shard = ShardEntry.model_validate_json(row["shard"])
        samples = read_whole_shard(self.index, shard, resolution=self.resolution, member=self.member)
        starts = range(0, len(samples.key), BATCH)
        tokens = np.concatenate([self.encode(samples.image[start : start + BATCH]) for start in starts])
        split = np.array(samples.split, dtype=str)
        self.files.write(row["name"], write_tokens(TokenSet(samples.key, tokens, samples.label, samples.text, split)))
        return {"name": row["name"]}

    def encode(self, pixels: np.ndarray) -> np.ndarray:  # (N, H, W, 3) uint8 -> (N, T) int64
        image = rearrange(torch.from_numpy(pixels).to(self.device), "n h w c -> n c h w").float() / 127.5 - 1
        return rearrange(self.network.tokenize(image), "n h w -> n (h w)").cpu().numpy()


def token_names(index: ShardIndex) -> list[str]:
    """File names in the order of the index; numbered, since two folders may hold tars of one name."""
    return [f"{number:06d}-{token_name(shard.url)}" for number, shard in enumerate(index.shards)]


def encode_shards(
    index: ShardIndex, tokenizer: Artifact, *, files: Store, resources: Resources, member: Member = "image"
) -> Iterator[int]:
    """Write the token files of all shards that `files` lacks; yields how many there are after each.

    Takes one actor for each of resources.num_actors. Raises ShardError for a shard that its index does not match.

    Args:
        member: what of each sample is its picture.
    """
    names, written = token_names(index), {file.path for file in files.list()}
    missing = [(name, shard) for name, shard in zip(names, index.shards, strict=True) if name not in written]
    yield len(names) - len(missing)
    if missing:
        rows = [{"name": name, "shard": shard.model_dump_json()} for name, shard in missing]
        for done, _ in enumerate(_encoded(rows, index, tokenizer, files, resources, member), start=1):
            yield len(names) - len(missing) + done


def _encoded(
    rows: Sequence[dict[str, str]],
    index: ShardIndex,
    tokenizer: Artifact,
    files: Store,
    resources: Resources,
    member: Member,
) -> Iterator[dict[str, str]]:
    header = index.model_copy(update={"shards": ()})
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        ShardEncoder,
        fn_constructor_args=(header, tokenizer, files, resources.threads, member),
        compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(rows))),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.iter_rows()
