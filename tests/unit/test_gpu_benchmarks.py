"""Laws of `make bench-gpu` that need no GPU: its cases compute, both sides the same shape, and cost what is counted."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from components.training.learner import make_network
from pipelines.recipes.published_networks import AUTOENCODERS, PAPER_DIFFUSION
from tests.benchmarks.gpu import diffusion, run, tokens, vqgan
from tests.benchmarks.gpu.case import Case, Side, number_of_parameters
from tests.benchmarks.run import keep
from tests.compiled_graphs import recorded_graphs

CPU = torch.device("cpu")
UNET = diffusion.UNetSize(8, 32, (1, 2), 1, (4,), 32, batch=2, steps=3)
PRIOR = tokens.PriorSize(2, 16, 32, 2, 2, batch=2, drawn=2)
TINY = {
    "unet_step": UNET,
    "dit_step": diffusion.DiTSize(8, 32, 2, 2, batch=2),
    "vqgan_step": vqgan.VQGANSize(32, 8, (1, 2), 1, 4, 8, 16, 8, batch=2),
    "prior_step": PRIOR,
    "decoding": PRIOR,
    "sampling": UNET,
}
FULL = {  # network of ours and of the peer
    "unet": (
        lambda: make_network(diffusion.unet_training(diffusion.ADM_64), diffusion.CLASSES),
        lambda: diffusion.peer_unet(diffusion.ADM_64),
    ),
    "prior": (
        lambda: make_network(tokens.prior_training(tokens.MEDIUM), tokens.CLASSES, tokens.MEDIUM.grid),
        lambda: tokens.peer_prior(tokens.MEDIUM),
    ),
    "vqgan": (lambda: make_network(vqgan.vqgan_training(vqgan.F16)), lambda: vqgan.peer_network(vqgan.F16)),
}


@functools.cache
def case_of(name: str) -> Case:
    return run.CASES[name](TINY[name])


def operations(side: Side) -> int:
    """Of a real step on this CPU, after the first one, which may be another."""
    step = side.make(CPU, False)
    step()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TINY)
def test_both_sides_of_a_case_compute_what_they_are_counted_to_need(name: str) -> None:
    case = case_of(name)
    assert operations(case.ours) == case.ours.flops > 0
    if name == "decoding":  # a static cache attends to what is still empty, and GPT-2's words are classes too
        assert operations(case.peer) > case.peer.flops
    else:
        assert operations(case.peer) == case.peer.flops > 0


@pytest.mark.parametrize("name", TINY)
def test_a_row_holds_finite_numbers_of_both_sides(name: str) -> None:
    row = run.row_of(case_of(name), CPU, compiled=False, rounds=1)
    numbers = {key: value for key, value in row.items() if key not in ("name", "unit")}
    assert {f"{figure}_{side}" for figure in ("memory_gb", "tflops") for side in ("ours", "peer")} < numbers.keys()
    assert all(math.isfinite(value) and value > 0 for value in numbers.values())
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert row["tflops_ours"] * row["ours"] * 1e12 == pytest.approx(case_of(name).ours.flops)


@pytest.mark.parametrize("name", TINY)
def test_a_training_s_step_has_modeled_seconds_on_a_known_card(name: str) -> None:
    case = case_of(name)
    found = run.modeled(case, "NVIDIA H100 80GB HBM3")
    assert found.keys() == ({"modeled"} if name.endswith("_step") else set())
    assert all(value > case.ours.flops / 989e12 for value in found.values())
    assert run.modeled(case, "NVIDIA H20") == {}


@pytest.mark.parametrize("name", ["vqgan_step", "decoding"])
def test_a_compiled_row_is_of_compiled_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = recorded_graphs(monkeypatch)
    row = run.row_of(case_of(name), CPU, compiled=True, rounds=1)
    assert row["name"] == f"{name}_compiled"
    assert graphs
    assert math.isfinite(row["ratio"])


@pytest.mark.parametrize("name", FULL)
def test_both_sides_have_as_many_parameters_at_full_size(name: str) -> None:
    ours, peer = (number_of_parameters(make) for make in FULL[name])
    assert abs(ours - peer) < 0.005 * ours


def test_every_case_is_tried_here_and_shapes_are_the_published_ones() -> None:
    assert TINY.keys() == run.CASES.keys()
    assert diffusion.unet_training(diffusion.ADM_64).network == PAPER_DIFFUSION["adm_imagenet_64"].network
    published = AUTOENCODERS["vqgan_imagenet_f16_1024"].training.network
    assert vqgan.vqgan_training(vqgan.F16).network == published
    xl = number_of_parameters(lambda: make_network(diffusion.dit_training(diffusion.XL_2), diffusion.CLASSES))
    assert xl == pytest.approx(675e6, rel=0.001)  # Peebles and Xie (2023), table 4


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typer_app = run.application()
    told = CliRunner().invoke(typer_app, [])
    assert (told.exit_code, told.output.count("\n")) == (0, 1)
    assert told.output.startswith("no GPU that torch can use")
    assert not [*tmp_path.iterdir()]
    assert CliRunner().invoke(typer_app, ["unet"]).exit_code == 2


def test_a_row_that_is_measured_again_replaces_that_of_its_name_alone(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    keep(file, [{"name": name, "ours": 1, "commit": "a"} for name in ("one", "other")], all_anew=True)
    keep(file, [{"name": "one", "ours": 2, "commit": "b"}], all_anew=False)
    assert [(row["name"], row["ours"], row["commit"]) for row in json.loads(file.read_text())] == [
        ("one", 2, "b"),
        ("other", 1, "a"),
    ]
    keep(file, [{"name": "one", "ours": 3}], all_anew=True)
    assert [row["name"] for row in json.loads(file.read_text())] == ["one"]
