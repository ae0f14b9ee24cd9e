"""Images of several jobs are sampled together where they agree, and each comes out as if it were alone."""

import io
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
from PIL import Image

from components.runtime.tracking.registry import Named
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.serving.messages import NO_KEY, Event, FinishedImage, ImageJob, Partial, Refused
from components.serving.replica import (
    Batcher,
    Measures,
    Ticket,
    WaitingImage,
    most_together,
    shown_steps,
    steps_of,
)
from components.serving.settings import Limits, ServedModel
from components.serving.versions import Version
from tests.tiny_cascade import write_cascade

WAIT = 60  # seconds
RED, FLAGS = Request(prompt="red apple", seed=3), Request(label="flags", seed=4)
TOKENS = Request(prompt="grey cat", seed=5, generator="tokens")
SLOW = Request(label=0, seed=9, steps=50, sampling=(("upsampler_16", "num_inference_steps", 50),))
SLOW_STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("batching"))


class Watched(Cascade):
    """A cascade that keeps the plans of each batch, and can be held before it samples."""

    def watch(self) -> "Watched":
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "steps", [])  # one for each that was begun
        object.__setattr__(self, "going", threading.Event())
        object.__setattr__(self, "begun", threading.Event())
        self.going.set()
        return self

    def make(self, plans, *, between, **options):
        def counted() -> None:
            between()
            self.steps.append(plans)

        self.seen.append(list(plans))
        self.begun.set()
        assert self.going.wait(WAIT)
        if any(plan.seed == 666 for plan in plans):
            raise RuntimeError("the machine is on fire")
        return super().make(plans, between=counted, **options)


@pytest.fixture
def cascade(folder: Path) -> Watched:
    return Watched.load(folder).watch()


@pytest.fixture
def version(cascade: Watched) -> Version:
    return Version(ServedModel(name="tiny", source="models:/tiny@champion"), Named("tiny", "1", 0), cascade)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher(
        limits=Limits(waiting_images=8, key_waiting_images=5), batch_images=4, measures=Measures("tiny"), threads=1
    )
    yield made
    made.close()


class Asked:
    """A job in a batcher and what comes of it."""

    def __init__(
        self, batcher: Batcher, version: Version, *requests: Request, partial_images: int = 0, key: str = NO_KEY
    ) -> None:
        self.told: Queue = Queue()
        plans = version.cascade.resolve_all(requests)
        self.ticket: Ticket | None = batcher.add(ImageJob(requests, partial_images, key), plans, version, self.told.put)
        self.images = len(requests)

    def events(self) -> list[Event]:
        """All of them, until the last image is made or one is refused."""
        found = []
        while sum(isinstance(event, FinishedImage) for event in found) < self.images:
            found.append(self.told.get(timeout=WAIT))
            if isinstance(found[-1], Refused):
                break
        return found

    def made(self) -> dict[int, np.ndarray]:
        return {event.image: pixels(event.png) for event in self.events() if isinstance(event, FinishedImage)}


def waiting(version: Version, request: Request) -> WaitingImage:
    return WaitingImage(Ticket(print, version), 0, request, version.cascade.resolve(request), {})


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def held(batcher: Batcher, cascade: Watched, version: Version) -> Asked:
    """The batcher at work on a job that goes on when it is told to."""
    cascade.going.clear()
    first = Asked(batcher, version, Request(label=1, seed=1))
    assert cascade.begun.wait(WAIT)
    return first


def test_what_agrees_is_one_batch_and_what_differs_is_another(batcher, cascade, version):
    first = held(batcher, cascade, version)
    few = RED.replace(seed=8, guidance_scale=2.0)
    jobs = [Asked(batcher, version, request) for request in (RED, few, FLAGS, TOKENS)]
    cascade.going.set()
    for job in (first, *jobs):
        job.made()
    seeds = [[request.seed for request in batch] for batch in cascade.seen]
    assert seeds == [[1], [RED.seed, FLAGS.seed], [few.seed], [TOKENS.seed]]


def test_an_image_of_a_batch_is_the_image_that_it_is_alone(batcher, cascade, version, folder):
    first = held(batcher, cascade, version)
    asked = [RED, FLAGS, Request(label="food", seed=77), TOKENS, TOKENS.replace(seed=6)]
    jobs = [Asked(batcher, version, *asked[:2]), *(Asked(batcher, version, request) for request in asked[2:])]
    cascade.going.set()
    first.made()
    together = [image for job in jobs for image in job.made().values()]
    assert [len(batch) for batch in cascade.seen] == [1, 3, 2]
    alone = Cascade.load(folder)
    for request, image in zip(asked, together, strict=True):
        (expected,) = alone.sample([request])
        assert np.abs(expected.astype(int) - image).max() <= 1


def test_a_batch_is_no_larger_than_it_may_be(batcher, cascade, version):
    Asked(batcher, version, *(RED.replace(seed=seed) for seed in range(6))).made()
    assert [len(batch) for batch in cascade.seen] == [4, 2]


def test_a_larger_image_leaves_room_for_fewer(version):
    """The batch of a size is as many images as memory holds of that size."""
    large = waiting(version, TOKENS)
    large.plan = replace(large.plan, size=(16, 512))  # no model of this cascade makes it
    assert most_together(16, large) == 4
    assert most_together(16, waiting(version, TOKENS)) == 16


def test_versions_are_never_mixed_and_a_job_keeps_its_own(batcher, cascade, version):
    first = held(batcher, cascade, version)
    old = Asked(batcher, version, RED, RED.replace(seed=5))
    new = Asked(batcher, replace(version, named=Named("tiny", "2", 0)), FLAGS)
    cascade.going.set()
    first.made()
    assert [event.version for event in old.events()] == ["1", "1"]
    assert [event.version for event in new.events()] == ["2"]
    assert [len(batch) for batch in cascade.seen] == [1, 2, 1]


def test_too_many_images_are_refused_and_those_that_are_made_do_not_count(batcher, cascade, version):
    first = held(batcher, cascade, version)
    waiting = Asked(batcher, version, *(RED.replace(seed=seed) for seed in range(8)))
    (refused,) = Asked(batcher, version, FLAGS).events()
    assert re.fullmatch(r"8 images wait already; try again in \d+ s", refused.message)
    assert refused.status == 429
    cascade.going.set()
    first.made()
    assert len(waiting.made()) == 8
    assert len(Asked(batcher, version, FLAGS).made()) == 1


def test_a_key_is_refused_at_its_share_of_what_waits_and_another_is_not(batcher, cascade, version):
    first = held(batcher, cascade, version)
    ours = Asked(batcher, version, *(RED.replace(seed=seed) for seed in range(5)), key="one")
    (refused,) = Asked(batcher, version, FLAGS, key="one").events()
    assert refused.message.startswith("5 images of this key wait already")
    other = Asked(batcher, version, FLAGS, key="other")
    cascade.going.set()
    first.made()
    assert (len(ours.made()), len(other.made())) == (5, 1)


def test_an_image_waits_for_one_batch_of_another_key_and_not_for_all_of_them(batcher, cascade, version):
    first = held(batcher, cascade, version)
    many = [Asked(batcher, version, TOKENS.replace(seed=seed), key="one") for seed in range(5)]
    few = [Asked(batcher, version, request, key="other") for request in (RED, SLOW)]
    cascade.going.set()
    first.made()
    for job in (*many, *few):
        job.made()
    order = [("one" if batch[0].seed < 5 and batch[0].generator == "tokens" else "other") for batch in cascade.seen[1:]]
    assert order == ["one", "other", "one", "other"]
    assert [len(batch) for batch in cascade.seen] == [1, 4, 1, 1, 1]


def test_a_job_of_more_images_than_may_wait_is_made_where_none_waits(batcher, version):
    assert len(Asked(batcher, version, *(RED.replace(seed=seed) for seed in range(9))).made()) == 9


def test_a_job_that_was_left_is_never_begun(batcher, cascade, version):
    first = held(batcher, cascade, version)
    left, kept = Asked(batcher, version, RED), Asked(batcher, version, FLAGS)
    batcher.cancel(left.ticket)
    cascade.going.set()
    first.made()
    kept.made()
    assert [[request.seed for request in batch] for batch in cascade.seen] == [[1], [FLAGS.seed]]
    assert left.told.empty()


def test_a_batch_that_everybody_left_ends_between_two_steps(batcher, cascade, version):
    slow = Asked(batcher, version, SLOW, partial_images=49)
    assert isinstance(slow.told.get(timeout=WAIT), Partial)
    batcher.cancel(slow.ticket)
    Asked(batcher, version, RED).made()
    assert not any(isinstance(slow.told.get(), FinishedImage) for _ in range(slow.told.qsize()))
    assert sum(requests[0].seed == SLOW.seed for requests in cascade.steps) < SLOW_STEPS / 2


def test_a_batch_that_one_of_two_left_goes_on(batcher, cascade, version):
    first = held(batcher, cascade, version)
    left, kept = Asked(batcher, version, SLOW, partial_images=49), Asked(batcher, version, SLOW.replace(seed=2))
    cascade.going.set()
    first.made()
    left.told.get(timeout=WAIT)
    batcher.cancel(left.ticket)
    assert len(kept.made()) == 1
    assert not any(isinstance(left.told.get(), FinishedImage) for _ in range(left.told.qsize()))


def test_previews_come_in_order_before_their_image_and_only_to_those_who_want_them(batcher, cascade, version):
    first = held(batcher, cascade, version)
    shown, plain = Asked(batcher, version, RED, FLAGS, partial_images=3), Asked(batcher, version, RED.replace(seed=1))
    cascade.going.set()
    first.made()
    assert [type(event) for event in plain.events()] == [FinishedImage]
    events = shown.events()
    for image in range(2):
        own = [event for event in events if event.image == image]
        assert [event.number for event in own[:-1]] == [0, 1, 2]
        assert [(event.stage, event.step) for event in own[:-1]] == [("base", 2), ("base", 4), ("upsampler_16", 2)]
        assert [pixels(event.png).shape for event in own] == [(8, 8, 3), (8, 8, 3), (16, 16, 3), (16, 16, 3)]
        assert isinstance(own[-1], FinishedImage)


def test_previews_do_not_change_the_image(batcher, version):
    shown, plain = (
        Asked(batcher, version, RED, partial_images=3).events()[-1],
        Asked(batcher, version, RED).events()[-1],
    )
    assert np.array_equal(pixels(shown.png), pixels(plain.png))


def test_an_image_that_fails_takes_no_other_with_it(batcher, cascade, version):
    first = held(batcher, cascade, version)
    good, bad = Asked(batcher, version, RED, FLAGS), Asked(batcher, version, RED.replace(seed=666))
    cascade.going.set()
    first.made()
    assert len(good.made()) == 2
    (error,) = bad.events()
    assert error == Refused(503, "the model failed to make this image; try again, or ask for another", 1)
    assert batcher.works


def test_a_closed_batcher_ends_its_thread_in_the_middle_of_a_batch(batcher, cascade, version):
    slow = Asked(batcher, version, SLOW, partial_images=49)
    slow.told.get(timeout=WAIT)
    batcher.close()
    batcher._thread.join(WAIT)
    assert not batcher.works
    assert len(cascade.steps) < SLOW_STEPS / 2


def test_previews_are_spread_over_all_steps_but_the_last():
    assert shown_steps({"base": 6, "upsampler": 2}, 3) == {("base", 2): 0, ("base", 4): 1, ("base", 6): 2}
    assert shown_steps({"base": 3}, 16) == {("base", 1): 0, ("base", 2): 1}
    assert shown_steps({"base": 1}, 3) == {}
    assert shown_steps({}, 3) == {}


def test_steps_are_those_that_a_request_asks_for(cascade):
    maker = cascade.makers["diffusion"]
    assert steps_of(maker, maker.resolve(RED)) == {"base": 4, "upsampler_16": 4}
    asked = RED.replace(steps=7, sampler="heun", sampling=(("upsampler_16", "num_inference_steps", 2),))
    assert steps_of(maker, maker.resolve(asked)) == {"base": 7, "upsampler_16": 2}
    assert steps_of(cascade.makers["tokens"], cascade.resolve(TOKENS)) == {}
