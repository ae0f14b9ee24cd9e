"""A worker of the tokens stage against the bare encoder: the same network, thread count and batch, and images that are
decoded in memory already on the peer's side. So the ratio is what reading, decoding, writing and records add.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from components.data.encoding import TokenEncoder, shard_jobs, token_names
from components.data.shards import View
from components.models.autoencoder import Autoencoder
from components.models.bundle import load_bundle
from components.runtime.storage.store import Store
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once
from tests.benchmarks.bench_reader_storage import make_index
from tests.benchmarks.interleaving import Row, interleaved, one_thread, own_ray, raced
from tests.benchmarks.photos import write_photos
from tests.image_sets import read_whole_shard
from tests.tiny_cascade import commit_model, write_model

RESOLUTION, SHARDS, SAMPLES = 64, 4, 256
NETWORK = {"resolution": RESOLUTION, "channels": 32, "channel_mult": [1, 2, 2, 4], "num_res_blocks": 1}
NETWORK |= {"attention_resolutions": [8], "latent_channels": 128}
NETWORK |= {"bottleneck": {"kind": "vq_ema", "codebook_size": 512, "codebook_dim": 8}}


def rows(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, one_thread():
        place = Path(folder)
        write_photos(place / "in", resolution=RESOLUTION, shards=SHARDS, samples=SAMPLES)
        with own_ray():
            index = make_index(str(place / "in"), str(place / "set"), RESOLUTION)
        model = write_model(place / "model", "autoencoder", NETWORK, {"resolution": RESOLUTION})
        encoder = TokenEncoder(index, commit_model(place, "tokenizer", "key", model), Store(str(place / "out")))
        images = [read_whole_shard(index, shard, View(RESOLUTION)).image for shard in index.shards]
        network = load_bundle(model).module
        assert isinstance(network, Autoencoder)
        network.to(memory_format=torch.channels_last)

        def ours() -> None:
            for job in shard_jobs(index, token_names(index)):
                encoder(job).finish()

        @torch.inference_mode()
        def peer() -> None:
            for image in images:
                encode(network, image)

        times = interleaved({"ours": ours, "peer": peer}, rounds=rounds, warm_up=1)
    return [raced("tokenization", times) | {"unit": f"s / {SHARDS * SAMPLES} images"}]


def encode(network: Autoencoder, pixels: np.ndarray) -> None:
    size = most_at_once(RESOLUTION)
    for first in range(0, len(pixels), size):
        network.tokenize(from_uint8(torch.from_numpy(pixels[first : first + size])))
