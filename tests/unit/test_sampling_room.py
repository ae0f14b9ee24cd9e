"""Laws of batches by memory, without a GPU: a hook plays the device that is full."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.evaluation.generated import (
    ENOUGH_JOBS,
    JOB_SIZE,
    LARGEST_JOB,
    SampleJob,
    draw_job,
    measured_jobs,
    try_room,
)
from components.sampling.cascade import Cascade
from components.sampling.device import Room
from components.sampling.model import in_slices, most_at_once
from components.sampling.requests import Request
from tests.limited_memory import out_of_memory
from tests.tiny_cascade import SAMPLING, write_cascade

CPU = torch.device("cpu")
ROOM = 3  # images at a time in the last stage
STEPS = {name: chosen["num_inference_steps"] for name, chosen in SAMPLING.items()}


@pytest.fixture
def cascade(tmp_path: Path) -> Cascade:
    return Cascade.load(write_cascade(tmp_path))


@pytest.fixture
def sizes(cascade: Cascade) -> dict[str, list[int]]:
    """Batches that the networks of both stages were given; the last stage is out of memory above ROOM images, of which
    guidance makes two."""
    seen: dict[str, list[int]] = {"base": [], "upsampler_16": []}
    models = {model.name: model for model in cascade.makers["diffusion"].models}

    def watch(name: str) -> None:
        def look(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name == "upsampler_16" and len(inputs[0]) > ROOM:
                raise out_of_memory()
            seen[name].append(len(inputs[0]))

        models[name].module.register_forward_pre_hook(look)

    for name in seen:
        watch(name)
    return seen


def job(count: int) -> SampleJob:
    requests = [Request(label=seed % 3, seed=seed, generator="diffusion", guidance_scale=1.0) for seed in range(count)]
    return SampleJob("job", tuple(requests))


def test_a_batch_that_has_no_room_is_halved_until_it_has_and_later_ones_begin_there(
    cascade: Cascade, sizes: dict[str, list[int]]
) -> None:
    room, asked = Room(CPU, LARGEST_JOB), job(10)
    made = room.work(10, lambda size: draw_job(cascade, asked, size)).fetched()
    assert room.most == 3  # of 10, 5, 3
    sizes["base"].clear()
    again = room.work(10, lambda size: draw_job(cascade, asked, size)).fetched()
    assert set(sizes["base"]) == {3, 1}
    np.testing.assert_array_equal(made.finished, again.finished)


def test_what_is_made_in_halves_is_what_is_made_at_once_within_a_gray_level(
    cascade: Cascade, sizes: dict[str, list[int]], tmp_path: Path
) -> None:
    made = Room(CPU, 10).work(10, lambda size: draw_job(cascade, job(10), size)).fetched()
    whole = draw_job(Cascade.load(write_cascade(tmp_path / "other")), job(10)).fetched()
    for stage, images in whole.stages.items():
        assert np.abs(images.astype(int) - made.stages[stage].astype(int)).max() <= 1


def test_room_is_tried_by_two_steps_of_every_stage_and_the_images_by_no_batch_too_large(
    cascade: Cascade, sizes: dict[str, list[int]]
) -> None:
    room, asked = Room(CPU, LARGEST_JOB), job(10)
    try_room(room, cascade, asked)
    assert room.most == 3
    assert sizes["base"].count(10) == sizes["base"].count(5) == 2  # steps, and not all of them
    sizes["base"].clear()
    room.work(10, lambda size: draw_job(cascade, asked, size))
    assert sorted(sizes["base"]) == [1] * STEPS["base"] + [3] * 3 * STEPS["base"]
    sizes["base"].clear()
    try_room(room, cascade, asked)
    assert sizes["base"] == []  # once is enough


def test_an_image_that_has_no_room_alone_and_any_other_error_are_told(cascade: Cascade) -> None:
    def full(size: int) -> None:
        raise out_of_memory()

    def broken(size: int) -> None:
        raise RuntimeError(f"no such kernel for {size}")

    with pytest.raises(torch.OutOfMemoryError):
        Room(CPU, 8).work(8, full)
    with pytest.raises(RuntimeError, match="no such kernel for 8"):
        Room(CPU, 8).work(9, broken)


def test_decoding_takes_no_more_at_a_time_than_it_has_room_for() -> None:
    seen: list[int] = []

    def double(part: Tensor) -> Tensor:
        seen.append(len(part))
        return 2 * part

    batch = torch.arange(100.0)[:, None]
    torch.testing.assert_close(in_slices(double, batch, resolution=256), 2 * batch)
    assert max(seen) == most_at_once(256) == 16


def test_jobs_grow_with_what_is_asked_for_and_a_few_thousand_are_cut_as_ever() -> None:
    for count, size in ((512, JOB_SIZE), (4096, JOB_SIZE), (10_000, 2 * JOB_SIZE), (50_000, LARGEST_JOB)):
        jobs = measured_jobs("diffusion", [Request(seed=seed) for seed in range(count)])
        assert [request.seed for job in jobs for request in job.requests] == list(range(count))
        assert {len(job.requests) for job in jobs[:-1]} == {size}
        assert len(jobs) >= min(ENOUGH_JOBS, count // JOB_SIZE)
    assert measured_jobs("tokens", [Request()])[0].name == "measured_tokens-000"
    assert jobs[0].name == "measured_diffusion_by_512-000"  # a file of another cut is not taken for one of this
