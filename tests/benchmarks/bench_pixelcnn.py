"""Drawing grids of 32×32 tokens from a gated PixelCNN and a Row LSTM: with the cache, against the whole grid anew for
every position.

Both sides: the same network, three layers of 32 channels after the first one, 512 different tokens, one image at
temperature 1, fp32 on one thread. The peer is the same network without its cache.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from components.configuration.sampling import TokenSampling
from components.models.pixelcnn import GatedPixelCNN
from components.models.row_lstm import RowLSTM
from components.sampling.autoregressive import PixelNetwork, draw, generate_grid
from components.sampling.plan import Conditions

SIZE, NUM_VALUES, CHANNELS, NUM_LAYERS, BATCH_SIZE = 32, 512, 32, 3, 1
NETWORKS = {"pixelcnn": GatedPixelCNN, "row_lstm": RowLSTM}


def make_network(kind: str) -> PixelNetwork:
    return NETWORKS[kind](
        num_values=NUM_VALUES,
        num_channels=1,
        channels=CHANNELS,
        num_layers=NUM_LAYERS,
        kernel_size=5,
        num_classes=10,
        embedding="table",
    ).eval()


def make_ours(network: PixelNetwork) -> Callable[[], None]:
    conditions = Conditions({"label": torch.zeros(BATCH_SIZE, dtype=torch.int64)}, {})

    def sample() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(BATCH_SIZE)]
        values = generate_grid(network, conditions, generators=generators, height=SIZE, width=SIZE)
        assert values.shape == (BATCH_SIZE, 1, SIZE, SIZE)

    return sample


def make_naive(network: PixelNetwork) -> Callable[[], None]:
    label = torch.zeros(BATCH_SIZE, dtype=torch.int64)

    @torch.inference_mode()
    def sample() -> None:
        values = torch.zeros(BATCH_SIZE, 1, SIZE, SIZE, dtype=torch.int64)
        uniforms = torch.rand(SIZE * SIZE, BATCH_SIZE)
        for index in range(SIZE * SIZE):
            row, column = divmod(index, SIZE)
            logits = network(values, label=label)[:, 0, row, column]
            values[:, 0, row, column] = draw(logits, uniforms=uniforms[index], sampling=TokenSampling())

    return sample


def measure(sample: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    sample()
    return time.perf_counter() - wall, time.process_time() - cpu


def row(kind: str, *, rounds: int) -> dict[str, Any]:
    """Medians of interleaved rounds, after one of ours that does not count."""
    network = make_network(kind)
    ours, naive = make_ours(network), make_naive(network)
    ours()
    times = [(*measure(ours), *measure(naive)) for _ in range(rounds)]
    ours_wall, ours_cpu, naive_wall, naive_cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "name": f"{kind}_sample_32_against_naive",
        "ours": ours_wall,
        "peer": naive_wall,
        "ratio": ours_wall / naive_wall,
        "unit": "s",
        "cpu_ours": ours_cpu,
        "cpu_peer": naive_cpu,
    }


def rows(rounds: int) -> list[dict[str, Any]]:
    """Naive drawing takes long and its ratio hardly moves, so three rounds are enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row(kind, rounds=min(rounds, 3)) for kind in NETWORKS]
    finally:
        torch.set_num_threads(before)
