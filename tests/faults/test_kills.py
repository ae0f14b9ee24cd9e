"""`kill -9` of everything that a run consists of, at ten random moments of one run: it ends with the same bytes."""

import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.cluster import TRAINER, Nodes, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import INTERVAL, Run, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
STEPS = 800
SEED = 5
VICTIMS = ["worker"] * 3 + ["controller"] * 2 + ["driver"] * 2 + ["node"] * 3


def strike(victim: str, cluster: Nodes, run: Run, driver: subprocess.Popen, numbers: random.Random) -> subprocess.Popen:
    """Kill, and do what an operator or an autoscaler would do then. Returns the driver that works now."""
    node = cluster.working()
    assert node is not None
    if victim == "worker":
        numbers.choice(processes(node, TRAINER)).kill()
    elif victim == "node":
        cluster.kill(node)
        cluster.add()
    elif victim == "controller":
        cluster.controllers()[0].kill()
        run.fail(driver, saying="controller died; run again")
        return run.start(RAY_ADDRESS=cluster.address)
    else:
        driver.kill()
        driver.wait()
        return run.start(RAY_ADDRESS=cluster.address)
    return driver


def test_ten_kills_change_no_byte(tmp_path: Path, undisturbed: Undisturbed, record: Record):
    numbers, run = random.Random(SEED), Run(tmp_path, steps=STEPS)
    victims = numbers.sample(VICTIMS, len(VICTIMS))
    with nodes(2) as cluster:
        driver = run.start(RAY_ADDRESS=cluster.address)
        for victim in victims:
            before = run.step()
            wait_until(lambda before=before: run.step() > before and cluster.is_training(), run)
            time.sleep(numbers.uniform(0, 0.5))
            print(f"kill -9 of the {victim} after step {run.step()}", flush=True)
            assert run.step() < STEPS - INTERVAL, "too fast to be killed ten times"
            driver = strike(victim, cluster, run, driver, numbers)
        run.finish(driver)
    hashes = run.hashes()
    assert hashes == undisturbed(STEPS)
    for victim, times in Counter(victims).items():
        record(f"kill -9 of the {victim}", times, f"same weights, sha256 {hashes['base'][:12]}…")
