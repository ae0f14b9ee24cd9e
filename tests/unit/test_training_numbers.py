"""Laws of the small parts: EMA, learning rate, randomness, windows, guard, checkpoint."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from components.configuration.optimization import OptimizationConfig
from components.training.optim import EMA, NonFiniteError, NonFiniteGuard, decay_at, learning_rate, make_optimizer
from components.training.parallel import ALONE
from components.training.randomness import Draws, cropped, draw_windows, step_generator
from components.training.sharding import clip
from tests.checkpoints import read_folder, write_checkpoint


def config(**changes: object) -> OptimizationConfig:
    numbers = {"total_steps": 100, "global_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 10}
    return OptimizationConfig(**(numbers | changes))


def test_ema_after_n_updates_is_its_closed_form() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = EMA(network, {"ema": partial(decay_at, decay=0.9)})
    expected = torch.zeros(1, 1, dtype=torch.float64)
    for update in range(1, 200):
        network.weight.data.fill_(float(update))
        ema.update(network)
        d = min(0.9, (1 + update) / (10 + update))
        expected = d * expected + (1 - d) * update
        torch.testing.assert_close(ema.network.weight.data.double(), expected, rtol=1e-5, atol=0)


def test_ema_keeps_fp32_and_copies_buffers() -> None:
    network = nn.BatchNorm1d(2).bfloat16()
    ema = EMA(network, {"ema": partial(decay_at, decay=0.9)})
    network.running_mean.fill_(3.0)
    ema.update(network)
    assert ema.network.weight.dtype == torch.float32
    assert ema.network.running_mean.tolist() == [3.0, 3.0]


def test_learning_rate_rises_linearly_to_the_peak_and_ends_at_its_fraction() -> None:
    for decay in ("linear", "cosine"):
        numbers = config(lr_decay=decay, final_lr_fraction=0.1)
        rates = [learning_rate(numbers, step) for step in range(1, 101)]
        assert rates[0] == pytest.approx(1e-3)
        assert rates[9] == pytest.approx(1e-2) == max(rates)
        assert rates[-1] == pytest.approx(1e-3)
        assert all(late < early for early, late in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("max_norm", "scale"), [(None, 1.0), (1.0, 0.2), (9.0, 1.0)])
def test_gradients_are_clipped_by_their_joint_norm_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, shards: bool, max_norm: float | None, scale: float
) -> None:
    network = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))])
    network[0].grad, network[1].grad = torch.tensor([3.0]), torch.tensor([4.0, 0.0])
    for name, alone in {"dist.all_reduce": lambda tensor: None, "average": lambda tensor, worker: tensor}.items():
        monkeypatch.setattr(f"components.training.sharding.{name}", alone)
    norm = clip(network, ALONE._replace(shards=shards), max_norm=max_norm)
    assert float(norm) == 5
    assert network[1].grad.tolist() == pytest.approx([4 * scale, 0.0], rel=1e-6)


def test_weight_decay_spares_biases_and_norms() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    decayed, spared = make_optimizer(network, config(weight_decay=0.1)).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0.0


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_batch() -> None:
    whole = torch.arange(100, 116)
    for draw in (
        lambda p: Draws(7).uniform(p, "a"),
        lambda p: Draws(7).integers(p, "a", high=1000),
        lambda p: Draws(7).normal(p, "a", (3, 4, 4)),
        lambda p: torch.stack([*draw_windows(3, p, resolution=64, size=16)[:2]], dim=1),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(whole[:5]), draw(whole[5:])]))
        assert torch.equal(draw(whole.flip(0)), draw(whole).flip(0))


def test_streams_seeds_and_positions_draw_different_numbers() -> None:
    position = torch.arange(1000)
    first = Draws(0).uniform(position, "a")
    assert first.unique().numel() > 990
    assert not torch.equal(first, Draws(0).uniform(position, "b"))
    assert not torch.equal(first, Draws(1).uniform(position, "a"))
    assert not torch.equal(*(draw_windows(seed, position, resolution=64, size=16).top for seed in (3, 4)))
    same = torch.rand(4, generator=step_generator(0, 3, stream="x"))
    assert torch.equal(same, torch.rand(4, generator=step_generator(0, 3, stream="x")))


def test_draws_have_the_moments_of_their_distributions() -> None:
    position = torch.arange(4000)
    uniform = Draws(0).uniform(position, "u")
    assert abs(uniform.mean() - 0.5) < 0.02
    assert 0 <= uniform.min() < uniform.max() < 1
    integers = Draws(0).integers(position, "i", high=10)
    assert integers.bincount(minlength=10).min() > 300
    normal = Draws(0).normal(position, "n", (4, 4))
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02


def test_guard_skips_bad_steps_and_stops_at_the_fifth_in_a_row() -> None:
    guard, nan, fine = NonFiniteGuard(), torch.tensor(float("nan")), torch.tensor(1.0)
    for step in range(15):  # never in a row
        assert not guard.admits(nan, step=step)
        assert guard.admits(fine, step=step)
    for step in range(4):
        assert not guard.admits(nan, step=step)
    with pytest.raises(
        NonFiniteError, match="not finite for 5 steps in a row, up to step 4; try a lower learning_rate"
    ):
        guard.admits(nan, step=4)


def test_checkpoint_with_non_finite_weights_is_never_written(tmp_path) -> None:
    write_checkpoint(tmp_path / "c", {"weights": {"a": torch.zeros(2)}}, step=1)
    with pytest.raises(NonFiniteError, match="a is not finite at step 2"):
        write_checkpoint(tmp_path / "c", {"weights": {"a": torch.tensor([1.0, float("inf")])}}, step=2)
    assert read_folder(tmp_path / "c")[0] == 1


def test_windows_lie_inside_and_each_place_comes_alike() -> None:
    windows = draw_windows(0, torch.arange(4000), resolution=8, size=5)
    for corner in (windows.top, windows.left):
        counts = corner.bincount(minlength=4)
        assert len(counts) == 4
        assert counts.min() > 900
    together = (4 * windows.top + windows.left).bincount(minlength=16)
    assert together.min() > 180


def test_all_images_of_a_sample_are_cut_alike_and_the_rest_stays() -> None:
    place = torch.arange(64.0).reshape(1, 1, 8, 8)
    batch = {"image": place.expand(3, 3, 8, 8), "low_res": -place.expand(3, 3, 8, 8), "label": torch.arange(3)}
    cut = cropped(batch, draw_windows(0, torch.arange(3), resolution=8, size=4))
    assert cut["image"].shape == (3, 3, 4, 4)
    assert torch.equal(cut["image"], -cut["low_res"])
    assert torch.equal(cut["label"], batch["label"])
    assert (cut["image"][:, 0].diff(dim=2) == 1).all()
    assert (cut["image"][:, 0].diff(dim=1) == 8).all()
    whole = draw_windows(0, torch.arange(3), resolution=8, size=8)
    assert torch.equal(cropped(batch, whole)["image"], batch["image"])
