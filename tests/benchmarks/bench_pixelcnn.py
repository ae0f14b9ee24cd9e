"""Drawing grids of 32×32 tokens from a gated PixelCNN and a Row LSTM: with the cache, against the whole grid anew for
every position.

Both sides: the same network, three layers of 32 channels after the first one, 512 different tokens, one image at
temperature 1, fp32 on one thread. The peer is the same network without its cache.
"""

import torch

from components.configuration.sampling import TokenSampling
from components.models.pixelcnn import GatedPixelCNN, RowLSTM
from components.sampling.autoregressive import PixelNetwork, draw, generate_grid
from components.sampling.plan import Conditions
from tests.benchmarks.interleaving import Row, Step, interleaved, one_thread, raced

SIZE, NUM_VALUES, BATCH_SIZE = 32, 512, 1
NETWORKS = {"pixelcnn": GatedPixelCNN, "row_lstm": RowLSTM}
SIZES = {"num_values": NUM_VALUES, "num_channels": 1, "channels": 32, "num_layers": 3, "kernel_size": 5}


def drawers(network: PixelNetwork) -> dict[str, Step]:
    label = torch.zeros(BATCH_SIZE, dtype=torch.int64)

    def cached() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(BATCH_SIZE)]
        conditions = Conditions({"label": label}, {})
        values = generate_grid(network, conditions, generators=generators, height=SIZE, width=SIZE)
        assert values.shape == (BATCH_SIZE, 1, SIZE, SIZE)

    @torch.inference_mode()
    def naive() -> None:
        values = torch.zeros(BATCH_SIZE, 1, SIZE, SIZE, dtype=torch.int64)
        uniforms = torch.rand(SIZE * SIZE, BATCH_SIZE)
        for index in range(SIZE * SIZE):
            row, column = divmod(index, SIZE)
            logits = network(values, label=label)[:, 0, row, column]
            values[:, 0, row, column] = draw(logits, uniforms=uniforms[index], sampling=TokenSampling())

    cached()  # does not count; its warm-up is enough for both
    return {"ours": cached, "peer": naive}


def rows(rounds: int) -> list[Row]:
    """Naive drawing takes long and its ratio hardly moves, so three rounds are enough."""
    with one_thread():
        networks = {kind: make(**SIZES, num_classes=10, embedding="table").eval() for kind, make in NETWORKS.items()}
        return [
            raced(f"{kind}_sample_32_against_naive", interleaved(drawers(network), rounds=min(rounds, 3), warm_up=0))
            for kind, network in networks.items()
        ]
