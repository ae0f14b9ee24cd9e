"""The tokens stage against the bare encoder: the same network, thread count and batch, the images already decoded in
memory on the peer's side. Time runs from the first finished shard to the last, while the actor works.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import ray
import torch

from components.data.encoding import encode_shards
from components.data.held_out import read_whole_shard
from components.data.shards import ShardIndex, View
from components.models.autoencoder import Autoencoder
from components.models.bundle import load_bundle
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once
from pipelines.engine.session import start_ray
from tests.benchmarks.bench_reader_storage import make_index
from tests.benchmarks.photos import write_photos
from tests.tiny_cascade import commit_model, write_model

RESOLUTION, SHARDS, SAMPLES = 64, 5, 256
NETWORK = {"resolution": RESOLUTION, "channels": 32, "channel_mult": [1, 2, 2, 4], "num_res_blocks": 1}
NETWORK |= {"attention_resolutions": [8], "latent_channels": 128}
NETWORK |= {"bottleneck": {"kind": "vq_ema", "codebook_size": 512, "codebook_dim": 8}}


def rows(rounds: int) -> list[dict[str, object]]:
    start_ray(worker_start_timeout=120, verbose=False)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            write_photos(place / "in", resolution=RESOLUTION, shards=SHARDS, samples=SAMPLES)
            index = make_index(str(place / "in"), str(place / "set"), RESOLUTION)
            model = write_model(place / "model", "autoencoder", NETWORK, {"resolution": RESOLUTION})
            tokenizer = commit_model(place, "tokenizer", "key", model)
            times = [(ours(index, tokenizer, place / str(n)), bare(index, model)) for n in range(rounds)]
    finally:
        ray.shutdown()
    mine, theirs = (median(pair[side] for pair in times) for side in (0, 1))
    ratio = median(a / b for a, b in times)
    unit = f"s / {(SHARDS - 1) * SAMPLES} images"
    return [{"name": "tokenization", "ours": mine, "peer": theirs, "ratio": ratio, "unit": unit}]


def ours(index: ShardIndex, tokenizer: Artifact, out: Path) -> float:
    """Seconds for all shards but the first, in which the actor starts."""
    done = encode_shards(index, tokenizer, files=Store(str(out)), resources=Resources(num_actors=1, threads=1))
    assert [next(done), next(done)] == [0, 1]
    start = time.perf_counter()
    assert list(done)[-1] == SHARDS
    return time.perf_counter() - start


@torch.inference_mode()
def bare(index: ShardIndex, model: Path) -> float:
    network = load_bundle(model).module
    assert isinstance(network, Autoencoder)
    network.to(memory_format=torch.channels_last)
    shards = [read_whole_shard(index, entry, View(RESOLUTION)).image for entry in index.shards]
    encode(network, shards[0])
    start = time.perf_counter()
    for pixels in shards[1:]:
        encode(network, pixels)
    return time.perf_counter() - start


def encode(network: Autoencoder, pixels: np.ndarray) -> None:
    size = most_at_once(RESOLUTION)
    for first in range(0, len(pixels), size):
        network.tokenize(from_uint8(torch.from_numpy(pixels[first : first + size])))


if __name__ == "__main__":
    for row in rows(1):
        print(row)
