"""`kill -9` of everything that a run consists of, at ten random moments of one run: it ends with the same bytes."""

import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.faults.cluster import TRAINER, Nodes, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import INTERVAL, Run, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/data", "components/runtime/storage", "components/training", "pipelines/engine/execute.py")
STEPS, ELASTIC = 800, 400
ROUNDING = 1e-3
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
    proof = run.same_as(undisturbed(STEPS))
    for victim, times in Counter(victims).items():
        record(f"kill -9 of the {victim}", times, proof)


def test_a_training_goes_on_with_the_workers_that_there_are(tmp_path: Path, record: Record):
    """Elastic: two nodes of one worker each; one node is lost, then the driver is killed and a node joins.

    The stream refuses to go on at any other sample than the next, so a run that ends has missed and doubled none; the
    weights are then those of a gang that never changed, but for the order in which numbers were added.
    """
    whole = Run(tmp_path / "whole", steps=ELASTIC)
    whole.finish(whole.start())
    run = Run(tmp_path / "elastic", steps=ELASTIC, min_workers=1, stages={"base": {"cpus_per_worker": 3}})  # of 4
    with nodes(2) as cluster:
        driver = run.start(RAY_ADDRESS=cluster.address)
        wait_until(lambda: run.step() >= INTERVAL and cluster.is_training(), run)
        assert len(cluster.trainers()) == 2
        cluster.kill(cluster.working())
        lost = run.step()
        wait_until(lambda: run.step() > lost + INTERVAL, run)
        assert len(cluster.trainers()) == 1
        driver.kill()
        driver.wait()
        cluster.add()
        driver = run.start(RAY_ADDRESS=cluster.address)
        before = run.step()
        wait_until(lambda: run.step() > before + INTERVAL, run)
        assert len(cluster.trainers()) == 2
        run.finish(driver)
    assert "room for 1 of 2 workers" in run.said()
    for name, weights in whole.weights().items():
        torch.testing.assert_close(run.weights()[name], weights, rtol=ROUNDING, atol=ROUNDING)
    record("node lost, node won, elastic", 2, "2, 1, then 2 workers: the same samples, weights equal but for rounding")
