"""Laws of finding how many samples a device has room for, without Ray; `limited_memory` plays the device."""

import json
import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.runtime.storage.store import Store
from components.sampling.device import halves
from components.training.batches import to_batch
from components.training.checkpoint import generator_states
from components.training.loop import Task, fit
from components.training.memory import KEPT, NoRoomError, even_part, with_room
from components.training.parallel import ALONE
from components.training.reporting import Reporter
from tests import trained_networks
from tests.distributed.recording import FileRecorder
from tests.limited_memory import break_off, forwards, limit_memory, network_of, out_of_memory
from tests.tiny_text_image import TEXT_IMAGE
from tests.tiny_training import assert_equal_bits, batches, rows_at, weights_of

ROOM = 2  # samples at a time, of 8
# A task each, and what draws for its samples; other networks of the same task take parts of a batch by the same code.
KINDS = ("tokenizer", "prior", "masked_prior", "pixelcnn", "cropped_upsampler", "hybrid", "image_to_image", *TEXT_IMAGE)
BRIEF: dict[str, Any] = {"total_steps": 4, "warmup_steps": 2}  # losses that a diffusion learns by count in the last one


made = partial(trained_networks.made, **BRIEF)


def with_room_in(folder: Path, task: Task, config: Any, *, start_step: int = 0) -> Iterator[dict[str, Tensor]]:
    """The batches of a start in the run folder `folder`, after the task was set to what it has room for."""
    recorder = FileRecorder(folder / "log.jsonl")
    reporter = Reporter(config.optimization, stage="base", worker=ALONE, recorder=recorder, start_step=start_step)
    rows = batches(config, to_batch, start_step=start_step)
    return with_room(task, rows, reporter, Store(str(folder)))


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_was_found_trains_as_one_that_was_told_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config, told = made(kind)
    told.max_batch = ROOM
    fit(told, batches(config, to_batch), config.optimization)
    task = made(kind)[1]
    limit_memory(task, ROOM)
    rows = with_room_in(tmp_path, task, config)
    assert task.max_batch == ROOM
    fit(task, rows, config.optimization)
    assert_equal_bits(weights_of(task), weights_of(told))


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_tries_leave_task_and_generators_as_they_were(kind: str, tmp_path: Path) -> None:
    """Those of a run that goes on after 3 steps; some tries break off halfway, and the last ones succeed."""
    config, first = made(kind)
    fit(first, batches(config, to_batch), config.optimization.model_copy(update={"total_steps": 3}))
    loaded, task = made(kind)[1], made(kind)[1]
    for other in (loaded, task):
        other.load_state_dict(torch.load(saved(first, tmp_path), weights_only=True))
    if kind != "gan":
        limit_memory(task, ROOM)
    train_step, generators = task.train_step, generator_states()

    def drawing(batch: Any, step: int) -> Any:
        torch.rand(3), np.random.rand(3), random.random()
        return train_step(batch, step)

    task.train_step = drawing
    with_room_in(tmp_path, task, config, start_step=3)
    assert is_same(generator_states(), generators)
    assert is_same(task.state_dict(), loaded.state_dict())
    assert all(parameter.grad is None for parameter in network_of(task).parameters())


def saved(task: Task, folder: Path) -> Path:
    torch.save(task.state_dict(), folder / "state.pt")
    return folder / "state.pt"


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_nothing_stays_of_a_step_that_broke_off_between_its_parts(kind: str) -> None:
    (config, undisturbed), task, other = made(kind), made(kind)[1], made(kind)[1]
    undisturbed.max_batch = task.max_batch = 4
    break_off(task, at=4 if kind in ("contrastive", "gan") else 2)  # the second part that goes backward
    with pytest.raises(torch.OutOfMemoryError):
        task.train_step(next(batches(config, to_batch)), 1)
    task.load_state_dict(other.state_dict())
    for either in (task, undisturbed):
        either.train_step(next(batches(config, to_batch)), 1)
    assert is_same(task.state_dict(), undisturbed.state_dict())


def test_a_compiled_network_is_compiled_for_the_size_that_was_found(tmp_path: Path) -> None:
    config, task = made("base", channel_mult=(1,), attention_resolutions=(), conditions=("label",))
    symbols, losses = [], task.losses

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        symbols.append([number for number in inputs if isinstance(number, torch.SymInt)])
        return graph.forward

    def refused(network: Any, batch: Any, *rest: Any) -> Tensor:
        found = losses(network, batch, *rest)
        if len(found) > ROOM:
            raise out_of_memory()
        return found

    task.losses = refused
    task.learner.network.compile(backend=backend)
    fit(task, with_room_in(tmp_path, task, config), config.optimization.model_copy(update={"total_steps": 1}))
    assert task.max_batch == ROOM
    assert symbols
    assert not any(symbols)  # none for a size that may change


def test_tries_take_two_steps_as_the_last_one_is(tmp_path: Path) -> None:
    """The optimizer's state is there in the second; a discriminator that is heard late is heard."""
    config, task = made("tokenizer", discriminator_start=3)
    steps, train_step = [], task.train_step
    task.train_step = lambda batch, step: steps.append((step, task.is_heard(step))) or train_step(batch, step)
    with_room_in(tmp_path, task, config)
    assert steps == [(4, True), (4, True)]
    assert task.max_batch == 8


def test_a_restart_takes_the_number_that_was_found_and_tries_nothing(tmp_path: Path) -> None:
    config, task = made("base")
    limit_memory(task, ROOM)
    with_room_in(tmp_path, task, config)
    assert json.loads((tmp_path / KEPT).read_text()) == {"max_batch_per_device": ROOM}
    again = made("base")[1]  # with room for all now
    with forwards(again) as sizes:
        with_room_in(tmp_path, again, config, start_step=3)
    assert again.max_batch == ROOM
    assert not sizes
    recorder = FileRecorder(tmp_path / "log.jsonl")
    (found,) = recorder.lines("metrics")
    assert found["max_batch_per_device"] == ROOM
    (warning,) = recorder.lines("warning")
    assert warning["line"] == "memory for 2 of a worker's 8 samples at a time: each step takes them in 4 parts"


def test_a_restart_with_nothing_left_to_train_evaluates_with_the_number(tmp_path: Path) -> None:
    config, task = made("base")
    (tmp_path / KEPT).write_text('{"max_batch_per_device": 2}')
    recorder = FileRecorder(tmp_path / "log.jsonl")
    reporter = Reporter(config.optimization, stage="base", worker=ALONE, recorder=recorder, start_step=4)
    assert not list(with_room(task, iter(()), reporter, Store(str(tmp_path))))
    assert task.max_batch == 2


def test_a_share_is_cut_into_equal_parts_as_few_as_can_be_and_none_larger_than_were_tried() -> None:
    for share in range(1, 70):
        tried = list(halves(share))
        assert (tried[0], tried[-1]) == (share, 1)
        for most in {*tried, 3, 4, 5, 8, share + 1}:
            parts = math.ceil(share / most)
            assert even_part(share, most=most) == math.ceil(share / parts) <= most


def test_with_fewer_workers_a_larger_share_is_taken_in_parts_of_the_number(tmp_path: Path) -> None:
    (tmp_path / KEPT).write_text('{"max_batch_per_device": 8}')
    config, task = made("base", global_batch_size=12)
    with_room_in(tmp_path, task, config)
    assert task.max_batch == 6


@pytest.mark.parametrize("kind", ["gan", "prior", "base"])
def test_where_parts_train_another_model_the_number_is_asked_for(kind: str, tmp_path: Path) -> None:
    config, task = made(kind, **({} if kind == "gan" else {"dropout": 0.1}))
    limit_memory(task, 7)
    with pytest.raises(NoRoomError, match=r"the 8 samples of a worker do not fit .* set max_batch_per_device"):
        with_room_in(tmp_path, task, config)
    assert not (tmp_path / KEPT).exists()


def test_where_parts_train_another_model_a_share_that_has_grown_is_tried_again_whole(tmp_path: Path) -> None:
    (tmp_path / KEPT).write_text('{"max_batch_per_device": 4}')
    config, task = made("gan")
    with_room_in(tmp_path, task, config)
    assert task.max_batch == 8
    smaller, task = made("gan", global_batch_size=4)
    with forwards(task) as sizes:
        with_room_in(tmp_path, task, smaller)
    assert task.max_batch == 4
    assert not sizes


def test_a_device_without_room_for_one_sample_is_named(tmp_path: Path) -> None:
    config, task = made("base")
    limit_memory(task, 0)
    with pytest.raises(NoRoomError, match="not even one sample at a time fits into the memory of cpu: "):
        with_room_in(tmp_path, task, config)


def test_an_error_that_is_not_of_memory_is_no_answer(tmp_path: Path) -> None:
    config, task = made("base")
    network_of(task).register_forward_pre_hook(lambda network, inputs: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        with_room_in(tmp_path, task, config)


@pytest.mark.parametrize(
    ("kind", "told", "share"),
    [*((kind, 2, 8) for kind in (*KINDS, "dit", "gan")), ("hybrid", None, 4), ("gan", None, 4)],
)
def test_evaluation_and_previews_take_no_more_at_a_time_than_training(kind: str, told: int | None, share: int) -> None:
    config, task = made(kind, global_batch_size=share)
    task.max_batch = told
    held_out, most = rows_at(config, range(1000, 1012)), min(told or share, share)
    task.state_dict()  # a GAN estimates its statistics here, which are of 64 samples at a time by their meaning
    with forwards(task) as sizes:
        task.evaluate(held_out)
    assert max(sizes) == most
    if kind in ("prior", "masked_prior"):
        return  # no previews without a tokenizer
    with forwards(task) as sizes:
        task.preview(held_out, 1)
    guided = 2 if kind in ("base", "dit", "hybrid", "image_to_image") else 1  # both predictions of a guided step
    assert max(sizes, default=0) <= guided * most
