"""Planning of a run on 100,000 shards and 10⁹ samples, three epochs from the middle of the second on: seconds and
megabytes from the address of the index to the places of a reader's first rows, imports not counted.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from tests.benchmarks.interleaving import Row, row

SHARDS, SAMPLES, BATCH = 100_000, 10**9, 1024


def rows(rounds: int) -> list[Row]:
    """`peer` is what the rows must stay below."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder))
        command = [sys.executable, "-m", "tests.benchmarks.bench_planning", folder]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    middle = {name: median(run[name] for run in runs) for name in runs[0]}
    return [
        row("planning", middle["seconds"], 2.0, "s, limit 2", cpu_ours=middle["cpu"]),
        row("planning_memory", middle["megabytes"], 500.0, "MB, limit 500"),
        row("planning_steps", middle["steps"], unit="s / 10,000 steps of a rank of 8"),
    ]


def write_index(folder: Path) -> None:
    each = SAMPLES // SHARDS
    same = {"bytes": 10**9, "samples": each, "train_samples": each, "quarantined": []}
    shards = [{"url": f"shard-{n:06d}.tar", "sha256": f"{n:064x}"} | same for n in range(SHARDS)]
    index = {"source": "folder", "license": "unspecified", "resolution": 64}
    index |= {"classes": [f"class {number}" for number in range(1000)], "holdout_fraction": 0, "samples": SAMPLES}
    index |= {"train_samples": SAMPLES, "quarantined": 0}
    index |= {"text": {"sha256": "0" * 64, "vocab_size": 8192, "text_length": 64}, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def plan(folder: str) -> dict[str, float]:
    """In a process of its own, so that its memory is known."""
    from components.data.decoded import ImageSamples
    from components.data.shards import View, load_index
    from components.data.stream import Layout, RankReader, Share

    memory = psutil.Process().memory_info().rss
    start, cpu = time.perf_counter(), time.process_time()
    index = load_index(folder)
    samples, steps = ImageSamples(index, View(64)), SAMPLES // BATCH
    share = Share(BATCH, 0, 192, steps * 9 // 2, start_step=steps * 3 // 2, world_size=8)
    reader = RankReader(samples, share, layout=Layout.of(samples, share))
    reader.order.locate(share.positions(share.start_step, share.start_step + 10))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    megabytes = (psutil.Process().memory_info().rss - memory) / 2**20
    start = time.perf_counter()
    for step in range(share.start_step, share.start_step + 10_000, 10):
        reader.order.locate(share.positions(step, step + 10))
    return {"seconds": seconds, "cpu": cpu, "megabytes": megabytes, "steps": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(plan(sys.argv[1])))
