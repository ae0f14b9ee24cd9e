"""What the training loop adds to a step of a small network: ours against the loops of accelerate and of Lightning, and
at 64 and 512 ranks, whose exchanges a backend of torch's own only pretends.

All loops train the same layers by AdamW with a schedule and a clipped gradient, on batches that are there, and write
metrics at every LOG_EVERY steps. Ours is `fit` with the product's learner, and its reporter with votes on leaving and
checkpoints. The peers live in a virtual environment of their own, made here.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from components.configuration.optimization import OptimizationConfig
from components.runtime import events
from components.training.learner import Learner, LearnerTask
from components.training.loop import Batch, Metrics, fit
from components.training.parallel import ALONE, Worker
from components.training.reporting import Reporter
from tests.benchmarks.bench_streaming import PEERS, peer_python
from tests.benchmarks.interleaving import Row, one_thread, row

WIDTH, LAYERS, BATCH, LOG_EVERY = 32, 4, 8, 50
STEPS, WARM_UP = 2_000, 200
LIMIT = 0.003  # seconds of a step that are not the model's
RANKS = (64, 512)
HOW = {"width": WIDTH, "layers": LAYERS, "batch": BATCH, "steps": STEPS, "warm_up": WARM_UP, "log_every": LOG_EVERY}
Seconds = tuple[float, float]  # of a step, by the clock and of the processor


def rows(rounds: int) -> list[Row]:
    """Seconds a step; of ranks, those beyond the same steps without our loop."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        command = [str(peer_python(Path(folder), "loops")), str(PEERS / "loops.py"), json.dumps(HOW)]
        runs = []
        for _ in range(rounds):
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ranks = {f"ranks_{size}": host_seconds(size) for size in RANKS}
            runs.append({"ours": loop_seconds(ALONE)} | json.loads(told.splitlines()[-1]) | ranks)
    seconds = {name: [median(column) for column in zip(*(run[name] for run in runs), strict=True)] for name in runs[0]}
    ours, cpu = seconds["ours"]
    peers = [(name, *seconds[name]) for name in ("accelerate", "lightning")]
    against = [row(f"loop_{name}", ours, wall, cpu_ours=cpu, cpu_peer=own) for name, wall, own in peers]
    of_ranks = [(size, *seconds[f"ranks_{size}"]) for size in RANKS]
    unit = f"s of host a step, limit {LIMIT}"
    return against + [row(f"loop_ranks_{size}", wall, LIMIT, unit, cpu_ours=own) for size, wall, own in of_ranks]


def make_network() -> nn.Module:
    """The layers that all loops train."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


class SmallTask(LearnerTask):
    """The product's step around the small network."""

    def make_learners(self) -> None:
        self.learner = Learner(make_network(), config=self.config.optimization, worker=self.worker)
        if isinstance(self.learner.forward, DistributedDataParallel):
            self.learner.forward.register_comm_hook(None, as_given)

    def part_losses(self, part: Batch) -> Metrics:
        return {"loss": self.learner.forward(part["image"]).square().mean()}


def loop_seconds(worker: Worker) -> Seconds:
    """A step of the product's loop."""
    sizes = {"total_steps": STEPS, "global_batch_size": BATCH * worker.world_size, "log_every": LOG_EVERY}
    config = OptimizationConfig(**sizes, learning_rate=1e-4, ema_decay=0.0, checkpoint_every=STEPS, sample_every=STEPS)
    task = SmallTask(SimpleNamespace(optimization=config, network=None), worker=worker)
    reporter = Reporter(config, stage="loop", worker=worker, recorder=events.Recorder(), start_step=0)
    marks: list[Seconds] = []
    batches = reporter.timed(marked({"position": torch.arange(BATCH), "image": torch.randn(BATCH, WIDTH)}, marks))
    watch = {"leave": lambda: reporter.clock.leaving, "due": reporter.clock.is_due}
    fit(task, batches, config, log=reporter.log, **watch)
    return between(marks)


def bare_seconds() -> Seconds:
    """The same step without a loop of ours: the wrapped network, its gradient, clipping and AdamW."""
    network = DistributedDataParallel(make_network(), broadcast_buffers=False, gradient_as_bucket_view=True)
    network.register_comm_hook(None, as_given)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    marks: list[Seconds] = []
    images: dict[str, Tensor] = {"image": torch.randn(BATCH, WIDTH)}
    for batch in marked(images, marks):
        network(batch["image"]).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return between(marks)


def host_seconds(ranks: int) -> Seconds:
    """Seconds of the host in a step of one of `ranks` that are not the model's."""
    with pretended(ranks):
        (ours, cpu), (bare, bare_cpu) = loop_seconds(Worker(0, ranks)), bare_seconds()
    return ours - bare, cpu - bare_cpu


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """This process is one of `ranks`, whose collectives return at once what they were given."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_given(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A bucket of gradients, exchanged with nobody: DDP takes no answer of the pretending backend itself."""
    del state
    answer = torch.futures.Future[Tensor]()
    answer.set_result(bucket.buffer())
    return answer


def marked(batch: Batch, marks: list[Seconds]) -> Iterator[Batch]:
    """The batch STEPS times; keeps the clocks of two of them."""
    for step in range(STEPS):
        if step in (WARM_UP, STEPS - 1):
            marks.append((time.perf_counter(), time.process_time()))
        yield batch


def between(marks: list[Seconds]) -> Seconds:
    """Seconds of a step between the marks."""
    (wall, cpu), (wall_end, cpu_end) = marks
    steps = STEPS - 1 - WARM_UP
    return (wall_end - wall) / steps, (cpu_end - cpu) / steps
