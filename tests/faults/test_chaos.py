"""Runs of a tiny cascade with several faults each, drawn by a seed: the same bytes, after a line that names the cause
wherever the same command had to be given again.

`make chaos SEED=7 RUNS=5` makes five runs on one cluster, of the seeds 7 to 11. Each seed has a row of its own in
`faults.json`: sittings add up, and the seed of a failure draws the same faults again.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from components.runtime.storage.lease import TTL
from tests.conftest import through_faults
from tests.faults.cluster import CONTROLLER, TRAINER, Nodes, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.proxy import counted
from tests.faults.runs import IMPATIENT, Run, clock, fill, small_disk
from tests.outages import Gate, gate
from tests.waiting import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]
PROVES = ("components/data", "components/runtime/storage", "components/training", "pipelines/engine")
SEED, RUNS = int(os.environ.get("CHAOS_SEED", "0")), int(os.environ.get("CHAOS_RUNS", "1"))
STEPS, STRIKES, STARTS, SECONDS = 90, 10, 16, 1800
MOST = 120  # seconds that a strike waits for its victim
PAUSE = (1.0, 9.0)  # seconds between two strikes
SPOOL = "runs/spool"  # of the driver's journal, below its folder
STAGE, RECORDER = "ray::run_stage", "ray::RunRecorder"
FAULTS: dict[str, Callable[["Chaos"], bool]] = {
    "driver killed": lambda chaos: chaos.kill_drivers() and chaos.start(),
    "rank killed": lambda chaos: chaos.hit(TRAINER, signal.SIGKILL),
    "controller killed": lambda chaos: chaos.hit(CONTROLLER, signal.SIGKILL),
    "recorder killed": lambda chaos: chaos.hit(RECORDER, signal.SIGKILL),
    "stage's task killed": lambda chaos: chaos.hit(STAGE, signal.SIGKILL),
    "stage's task stopped for longer than a lease": lambda chaos: chaos.stall(),
    "node lost": lambda chaos: chaos.lose_node(notice=False),
    "node taken back with notice": lambda chaos: chaos.lose_node(notice=True),
    "store away": lambda chaos: chaos.close_store(),
    "second driver": lambda chaos: chaos.start(),
    "second driver, its clock hours away": lambda chaos: chaos.start(hours=chaos.numbers.choice([-24, -1, 1, 24])),
    "all nodes lost, the head too": lambda chaos: chaos.lose_all(),
    "disk of the journal full": lambda chaos: chaos.fill_disk(),
    "bit of a checkpoint changed": lambda chaos: chaos.damage(),
}


class Chaos:
    """One run, and what is done to it; each fault says whether there was something to strike."""

    def __init__(self, run: Run, cluster: Nodes, network: Gate, numbers: random.Random) -> None:
        self.run, self.cluster, self.network, self.numbers = run, cluster, network, numbers

    def start(self, *, hours: int = 0) -> bool:
        settings = {"AWS_ENDPOINT_URL": self.network.address, "FSSPEC_S3": IMPATIENT}
        settings |= clock(self.run.place, 3600 * hours) if hours else {}
        self.run.start(RAY_ADDRESS=self.cluster.address, CASCADE_OUTAGE_SECONDS="300", **settings)
        return True

    def works(self) -> bool:
        return any(driver.poll() is None for driver in self.run.drivers)

    def strikes(self, fault: Callable[["Chaos"], bool]) -> bool:
        """Strike as soon as there is something to strike; False where the run was over before."""
        struck = False

        def strike() -> bool:
            nonlocal struck
            struck = self.works() and bool(fault(self))
            return struck or not self.works()

        eventually(strike, MOST, pause=0.5)
        return struck

    def hit(self, title: str, how: signal.Signals) -> psutil.Process | None:
        """Send a signal to one of the processes with a title."""
        hosts = [self.cluster.cluster.head_node, *self.cluster.cluster.worker_nodes]
        if not (found := [process for node in hosts for process in processes(node, title)]):
            return None
        (victim := self.numbers.choice(found)).send_signal(how)
        return victim

    def stall(self) -> bool:
        """A second driver takes over meanwhile."""
        if (victim := self.hit(STAGE, signal.SIGSTOP)) is None:
            return False
        self.start()
        time.sleep(TTL + 10)
        if victim.is_running():
            victim.send_signal(signal.SIGCONT)
        return True

    def kill_drivers(self) -> bool:
        for driver in self.run.drivers:
            driver.kill()
            driver.wait()
        return True

    def lose_node(self, *, notice: bool) -> bool:
        if (node := self.cluster.working()) is None:
            return False
        self.cluster.add()
        if notice:
            self.cluster.drain(node, seconds=15)
            time.sleep(15)
        self.cluster.kill(node)
        return True

    def lose_all(self) -> bool:
        """The drivers' machine goes too, and the job is submitted again."""
        self.kill_drivers()
        self.cluster.replace()
        return self.start()

    def fill_disk(self) -> bool:
        """For seconds; only root has the small disk."""
        if not (spool := self.run.place / SPOOL).is_mount():
            return False
        ballast = fill(spool)
        time.sleep(self.numbers.uniform(2, 10))
        ballast.unlink()
        return True

    def close_store(self) -> bool:
        self.network.close_for(self.numbers.choice([5, 20, 60]), self.numbers.choice(["refuses", "hangs", "says 503"]))
        return True

    def damage(self) -> bool:
        """Of the last one, while no driver works."""
        if not self.run.step():
            return False
        self.kill_drivers()
        eventually(lambda: not self.cluster.trainers(), 60)
        train = self.run.train()
        names = [info.path for info in train.list() if info.path.startswith(f"step-{self.run.step():09d}")]
        largest = max((name for name in names if not name.endswith(".json")), key=lambda name: len(train.read(name)))
        data = bytearray(train.read(largest))
        data[self.numbers.randrange(len(data))] ^= 1
        train.write(largest, bytes(data))
        return self.start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(2) as made:
        yield made


@pytest.mark.parametrize("seed", range(SEED, SEED + RUNS))
def test_a_run_with_many_faults_leaves_the_same_bytes(
    seed: int,
    cluster: Nodes,
    s3_server: str,
    s3_bucket: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(f"{__name__}.SEED", seed)  # of the row
    numbers, log, done = random.Random(seed), tmp_path / "requests.jsonl", Counter[str]()
    until = "evaluation" if seed % 10 == 0 else "base"  # every tenth is the whole of `smoke`
    whole = undisturbed(STEPS, until=until)
    run = Run(tmp_path / "run", steps=STEPS, storage=f"{s3_bucket}/runs", until=until)
    with ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(small_disk(run.place / SPOOL, megabytes=2))
        hurt = stack.enter_context(through_faults(s3_server, log, seed=seed, gap=(6, 16), hang=3.0))
        chaos = Chaos(run, cluster, stack.enter_context(gate(hurt)), numbers)
        stack.callback(chaos.kill_drivers)
        chaos.start()
        for fault in numbers.sample(list(FAULTS), k=STRIKES):  # each at most once: rare ones come as often
            time.sleep(numbers.uniform(*PAUSE))
            if chaos.strikes(FAULTS[fault]):
                print(f"seed {seed}: {fault} at step {run.step()}", flush=True)
                done[fault] += 1
        go_on_to_the_end(chaos)
    done.update({f"{kind}: {fault}": times for (kind, fault), times in counted(log).items()})
    counts = ", ".join(f"{fault} {times}" for fault, times in sorted(done.items()))
    record(f"seed {seed}", done.total(), f"{len(run.drivers)} starts; {run.same_as(whole)}; {counts}")


def go_on_to_the_end(chaos: Chaos) -> None:
    """Give the same command again after each line that names a cause, until one ends well."""
    run, deadline = chaos.run, time.monotonic() + SECONDS
    while time.monotonic() < deadline and len(run.drivers) < STARTS:
        assert eventually(lambda: not chaos.works(), SECONDS, pause=0.5), run.said()[-4000:]
        if 0 in [driver.returncode for driver in run.drivers]:
            return
        assert "failed: " in run.said(), run.said()[-4000:]
        chaos.start()
    raise AssertionError(run.said()[-4000:])
