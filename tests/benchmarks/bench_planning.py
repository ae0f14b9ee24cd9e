"""Planning of a run on 100,000 shards and 10⁹ samples, three epochs from the middle of the second on: seconds and
megabytes from the address of the index to the first work of a reader, imports and Ray's own start not counted.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import psutil

SHARDS, SAMPLES, BATCH = 100_000, 10**9, 1024


def rows(rounds: int) -> list[dict[str, object]]:
    """`peer` is what the rows must stay below."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder))
        command = [sys.executable, "-m", "tests.benchmarks.bench_planning", folder]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    middle = {name: median(run[name] for run in runs) for name in runs[0]}
    return [
        row("planning", middle["seconds"], "s, limit 2", peer=2.0, cpu=middle["cpu"]),
        row("planning_memory", middle["megabytes"], "MB, limit 500", peer=500.0),
        row("planning_tasks", middle["tasks"], "s / 10,000 reading tasks"),
    ]


def row(name: str, mine: float, unit: str, *, peer: float | None = None, cpu: float | None = None) -> dict[str, object]:
    ratio = None if peer is None else mine / peer
    return {"name": name, "ours": mine, "peer": peer, "ratio": ratio, "unit": unit, "cpu_ours": cpu}


def write_index(folder: Path) -> None:
    shards = [
        {
            "url": f"shard-{number:06d}.tar",
            "bytes": 10**9,
            "sha256": f"{number:064x}",
            "samples": SAMPLES // SHARDS,
            "train_samples": SAMPLES // SHARDS,
            "quarantined": [],
        }
        for number in range(SHARDS)
    ]
    index = {
        "source": "folder",
        "license": "unspecified",
        "resolution": 64,
        "classes": [f"class {number}" for number in range(1000)],
        "holdout_fraction": 0,
        "samples": SAMPLES,
        "train_samples": SAMPLES,
        "quarantined": 0,
        "text": {"sha256": "0" * 64, "vocab_size": 8192, "text_length": 64},
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def plan(folder: str) -> dict[str, float]:
    """In a process of its own, so that its memory is known."""
    import ray

    from components.data.shards import load_index
    from components.data.stream import Layout, plan_chunks, training_stream
    from pipelines.engine.session import start_ray

    start_ray(worker_start_timeout=120, verbose=False)
    memory = psutil.Process().memory_info().rss
    start, cpu = time.perf_counter(), time.process_time()
    index = load_index(folder)
    steps = SAMPLES // BATCH
    how = {"start_step": steps * 3 // 2, "total_steps": steps * 9 // 2}
    training_stream(index, resolution=64, global_batch_size=BATCH, world_size=8, seed=0, **how)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    megabytes = (psutil.Process().memory_info().rss - memory) / 2**20
    start = time.perf_counter()
    sum(1 for _ in islice(plan_chunks(index, Layout(64, BATCH, 8, 0, 64), **how), 10_000))
    tasks = time.perf_counter() - start
    ray.shutdown()
    return {"seconds": seconds, "cpu": cpu, "megabytes": megabytes, "tasks": tasks}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(plan(sys.argv[1])))
    else:
        for row in rows(1):
            print(row)
