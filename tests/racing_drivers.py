"""Laws of store, lease and artifact, whatever four drivers do at once on a store that fails.

Hypothesis draws what happens next, and prints the shortest way that it finds to a law's breach.
"""

from collections import Counter

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from components.runtime.storage.artifact import load_artifact
from components.runtime.storage.lease import TTL
from components.runtime.storage.store import Store
from tests.simulated_drivers import ROOT, STAGE, TRUTH, Answer, Driver, World

STEPS_EACH = 60  # of one world
DRIVERS = st.integers(0, 3)
STRANDS = st.integers(0, 1)
ANSWERS = st.lists(st.sampled_from(["ok", "refused", "lost"]), min_size=1, max_size=12)


class Drivers(RuleBasedStateMachine):
    """No commit is lost, none is made twice, no damage is adopted, no former holder of a lease changes anything.

    A driver stands still where no rule chooses it while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.world = World(self.patch, drivers=4)
        self.world.counts["steps"] -= 1  # the look before the first

    @property
    def idle(self) -> list[Driver]:
        return [driver for driver in self.world.drivers if not driver.strands]

    def driver(self, number: int) -> Driver:
        """One of those that work, or of all where none does."""
        working = [driver for driver in self.world.drivers if driver.strands] or self.world.drivers
        return working[number % len(working)]

    @rule(kind=st.sampled_from(["plain", "forced", "collect"]), count=st.integers(0, 80))
    def begin(self, kind: str, count: int) -> None:
        if idle := self.idle:
            driver = idle[0]
            driver.collect() if kind == "collect" else driver.work(forced=kind == "forced")
            for turn in range(count):
                driver.go_on(turn, "ok")

    @rule(number=DRIVERS, strand=STRANDS, count=st.integers(1, 40))
    def go_on(self, number: int, strand: int, count: int) -> None:
        driver = self.driver(number)
        for _ in range(count):
            driver.go_on(strand, "ok")

    @rule(number=DRIVERS, strand=STRANDS, answers=ANSWERS)
    def fail(self, number: int, strand: int, answers: list[Answer]) -> None:
        driver = self.driver(number)
        for answer in answers:
            driver.go_on(strand, answer)

    @rule(seconds=st.sampled_from([1.0, TTL / 6, TTL]), still=DRIVERS, count=st.integers(0, 30))
    def pass_time(self, seconds: float, still: int, count: int) -> None:
        """All but one of the drivers go on meanwhile."""
        stopped = self.driver(still)
        for _ in range(3):
            self.world.seconds += seconds
            for driver in self.world.drivers:
                for turn in range(count if driver is not stopped else 0):
                    driver.go_on(turn, "ok")

    @rule(number=DRIVERS, seconds=st.sampled_from([TTL / 2, 2 * TTL, 3600.0]))
    def set_clock(self, number: int, seconds: float) -> None:
        self.world.counts["clock set"] += 1
        self.driver(number).ahead += seconds

    @rule(number=DRIVERS, spare=st.integers(0, 4))
    def kill(self, number: int, spare: int) -> None:
        if not spare and self.driver(number).strands:
            self.world.counts["driver killed"] += 1
            self.driver(number).kill()

    @rule(which=st.integers(0, 99), place=st.integers(0, 999))
    def damage(self, which: int, place: int) -> None:
        """One bit of a file of parts or of the training changes."""
        if names := sorted(name for name in self.world.files if name.startswith((f"{STAGE}/files", f"{STAGE}/train"))):
            self.world.counts["bit changed"] += 1
            self.world.damage(names[which % len(names)], place)

    @invariant()
    def the_laws_hold(self) -> None:
        self.world.counts["steps"] += 1
        assert not self.world.broken, self.world.broken
        for listed in self.world.commits.values():
            assert {path.partition("/")[2]: digest for path, digest in listed.items()} == TRUTH

    def teardown(self) -> None:
        """The network is mended and all go on: who works on a stage then gets the commit that is there."""
        try:
            self.the_last_one_gets_a_whole_commit()
        finally:
            self.patch.undo()

    def the_last_one_gets_a_whole_commit(self) -> None:
        world = self.world
        last = (self.idle or world.drivers)[0]
        last.kill()
        last.work(forced=False)
        for _ in range(3000):
            if not any([driver.go_on(number, "ok") for driver in world.drivers for number in (0, 1)]):
                world.seconds += 1
            if not any(driver.strands for driver in world.drivers):
                break
        else:
            raise AssertionError("they wait for each other")
        assert not world.broken, world.broken
        stored = load_artifact(Store(f"{ROOT}/stages/base/k"))
        assert stored is not None
        assert last.result is not None


def race(steps: int, *, seed: int) -> Counter[str]:
    """So many steps, drawn by a seed; what was done how often."""
    counts: Counter[str] = Counter()

    class Counted(Drivers):
        def teardown(self) -> None:
            counts.update(self.world.counts)
            super().teardown()

    machines = settings(
        max_examples=-(-steps // STEPS_EACH), stateful_step_count=STEPS_EACH, deadline=None, database=None
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Counted), settings=machines)
    return counts
