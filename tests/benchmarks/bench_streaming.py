"""The stream of a rank against MosaicML Streaming, whose idea of canonical nodes it shares: the same JPEGs, as many
threads as it has processes, whole images into the loop. The peer reads files in its own format, ours the tars.

The peer lives in a virtual environment of its own, made here: its dependencies can't be ours. Both sides run in turn,
and are measured over batches in the middle of a stream; `streaming_first` and `streaming_resumed` are seconds to the
first batch, of a new stream and of one that goes on where the other stopped.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from components.data.decoded import ImageSamples
from components.data.shards import ShardIndex, View
from components.data.stream import rank_batches
from tests.benchmarks.bench_reader_storage import make_index
from tests.benchmarks.interleaving import Row, cpu_of_tree, own_ray, row
from tests.benchmarks.photos import write_photos

RESOLUTION, SHARDS, SAMPLES, READERS = 64, 24, 1024, 3
BATCH, WARM_UP, STEPS = 64, 200, 300
PEERS = Path(__file__).parent / "peers"


def rows(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, own_ray():
        place = Path(folder)
        python = peer_python(place / "venv", "mosaic")
        write_photos(place / "in", resolution=RESOLUTION, shards=SHARDS, samples=SAMPLES)
        index = make_index(str(place / "in"), str(place / "set"), RESOLUTION)
        how = json.dumps({"batch": BATCH, "warm_up": WARM_UP, "steps": STEPS, "readers": READERS})
        command = [str(python), str(PEERS / "mosaic.py"), str(place / "in"), str(place / "mds"), how]
        found = []
        for _ in range(rounds):
            peer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append((ours(index), json.loads(peer.splitlines()[-1])))
    mine, theirs = (medians([each[side] for each in found]) for side in (0, 1))
    unit = f"s / {STEPS * BATCH} images"
    return [
        row("streaming", mine["seconds"], theirs["seconds"], unit, cpu_ours=mine["cpu"], cpu_peer=theirs["cpu"]),
        row("streaming_first", mine["first"], theirs["first"]),
        row("streaming_resumed", mine["resumed"], theirs["resumed"]),
    ]


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([each[key] for each in found])) for key in found[0]}


def peer_python(folder: Path, peer: str) -> Path:
    """The interpreter of a new virtual environment with the packages of a peer.
    It sees packages of this one behind its own, so that torch is there already."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    own = next((folder / "lib").glob("python3*/site-packages"))
    (own / "behind.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", PEERS / f"{peer}.txt"], check=True)
    return folder / "bin" / "python"


def stream(index: ShardIndex, *, start_step: int) -> Iterator[np.ndarray]:
    samples, steps = ImageSamples(index, View(RESOLUTION)), 3 * (WARM_UP + STEPS)
    how = {"global_batch_size": BATCH, "seed": 0, "streams": 12, "threads": READERS}
    for batch in rank_batches(samples, total_steps=steps, start_step=start_step, **how):
        yield batch["image"]


def ours(index: ShardIndex) -> dict[str, float]:
    """Seconds and CPU seconds, as `peers/mosaic.py` measures its own."""
    start, batches = time.perf_counter(), stream(index, start_step=0)
    next(batches)
    found = {"first": time.perf_counter() - start}
    for _ in islice(batches, WARM_UP):
        pass
    start, used = time.perf_counter(), cpu_of_tree()
    assert sum(len(batch) for batch in islice(batches, STEPS)) == STEPS * BATCH
    found |= {"seconds": time.perf_counter() - start, "cpu": cpu_of_tree() - used}
    del batches
    start = time.perf_counter()
    next(stream(index, start_step=1 + WARM_UP + STEPS))
    return found | {"resumed": time.perf_counter() - start}
