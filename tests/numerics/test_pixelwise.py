"""Laws of exact models of images and of drawing from them, and of what PixelCNN and Row LSTM can see."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.configuration.sampling import TokenSampling
from components.models.pixelcnn import GatedPixelCNN, RowLSTM, lstm
from components.sampling.autoregressive import PixelNetwork, generate_grid
from components.sampling.plan import Conditions
from tests.token_models import assert_own_streams, generators, unmoved

KINDS: dict[str, type[GatedPixelCNN] | type[RowLSTM]] = {"pixelcnn": GatedPixelCNN, "row_lstm": RowLSTM}
Place = tuple[int, int, int]  # row, column, color


def make_model(kind: str, **settings: Any) -> PixelNetwork:
    """In fp64, with weights of unit gain, so that every part shows in the logits."""
    torch.manual_seed(0)
    numbers = {"num_values": 5, "num_channels": 3, "channels": 24, "num_layers": 2, "kernel_size": 3, "num_classes": 4}
    model = KINDS[kind](**(numbers | settings)).double().eval()
    for name, parameter in model.named_parameters():
        if "label" in name:
            parameter.data.normal_()
        elif parameter.ndim > 1 and not name.startswith("embedding"):
            parameter.data.mul_(2)
    return model


def random_values(model: PixelNetwork, *, batch_size: int, height: int, width: int, num_values: int = 5) -> Tensor:
    return torch.randint(0, num_values, (batch_size, model.num_channels, height, width))


def seen_places(model: PixelNetwork, *, height: int, width: int) -> dict[Place, set[Place]]:
    """For each value the places whose values its logits depend on: where the gradient is not exactly zero.

    Of four images, because in a single one all of a color's units in the head can be off.
    """
    embedded = {}
    hook = model.embedding.register_forward_hook(
        lambda _module, _inputs, output: embedded.update(x=output.detach().requires_grad_()) or embedded["x"]
    )
    logits = model(random_values(model, batch_size=4, height=height, width=width))
    hook.remove()
    colors = torch.tensor(model.embedding.groups)
    seen = {}
    for place in places(model, height=height, width=width):
        row, column, color = place
        loss = logits[:, color, row, column].square().sum()
        (gradient,) = torch.autograd.grad(loss, embedded["x"], retain_graph=True)
        seen[place] = {
            (int(i), int(j), int(colors[channel]))
            for channel, i, j in (gradient != 0).any(dim=0).nonzero()
            if colors[channel] >= 0
        }
    return seen


def places(model: PixelNetwork, *, height: int, width: int) -> list[Place]:
    """In the order in which they are drawn, which is the order of the tuples."""
    return [
        (row, column, color) for row in range(height) for column in range(width) for color in range(model.num_channels)
    ]


LABEL = torch.tensor([0, 3, 4])  # 4 is the null label
BOTH = pytest.mark.parametrize("kind", KINDS)
INPUTS = pytest.mark.parametrize(
    ("num_channels", "embedding"), [(3, "intensity"), (1, "intensity"), (1, "table"), (2, "table")]
)


def drawn(
    model: PixelNetwork, *seeds: int, height: int, width: int, label: Tensor | None = None, **settings: float
) -> Tensor:
    given, null = {}, {}
    if label is not None:
        given, null = {"label": label}, {"label": torch.full_like(label, 4)}
    how = {"height": height, "width": width, "sampling": TokenSampling(**settings)}
    return generate_grid(model, Conditions(given, null), generators=generators(*seeds), **how)


def log_likelihoods(model: PixelNetwork, values: Tensor, label: Tensor | None = None) -> Tensor:
    """(B, C, H, W) -> (B,) in nats."""
    logits = model(values, label=label).log_softmax(dim=-1)
    return logits.gather(-1, values[..., None]).sum(dim=(1, 2, 3, 4))


@torch.no_grad()
@BOTH
@INPUTS
def test_cached_logits_equal_those_of_the_full_forward(kind: str, num_channels: int, embedding: str):
    model = make_model(kind, num_channels=num_channels, embedding=embedding, kernel_size=5)
    values = random_values(model, batch_size=3, height=5, width=6)
    sequence = rearrange(values, "b c h w -> (h w c) b")
    logits, cache = model.start(3, height=5, width=6, label=LABEL)
    stepped = [logits, *(model.step(column, cache=cache) for column in sequence[:-1])]
    expected = rearrange(model(values, label=LABEL), "b c h w k -> (h w c) b k")
    torch.testing.assert_close(torch.stack(stepped), expected, atol=1e-12, rtol=0)
    assert expected.std() > 0.1
    with pytest.raises(IndexError, match="cache is full"):
        model.step(sequence[-1], cache=cache)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize(
    ("num_values", "num_channels", "width", "embedding"),
    [(2, 3, 2, "intensity"), (3, 1, 3, "intensity"), (3, 1, 3, "table")],
)
def test_probabilities_of_all_images_sum_to_one(
    kind: str, num_values: int, num_channels: int, width: int, embedding: str
):
    model = make_model(kind, num_values=num_values, num_channels=num_channels, embedding=embedding)
    every = itertools.product(range(num_values), repeat=num_channels * 2 * width)
    images = rearrange(torch.tensor(list(every)), "n (c h w) -> n c h w", c=num_channels, h=2)
    likelihoods = log_likelihoods(model, images, torch.ones(len(images), dtype=torch.int64))
    assert likelihoods.std() > 0.1
    torch.testing.assert_close(likelihoods.exp().sum(), torch.tensor(1.0).double(), atol=1e-12, rtol=0)


@torch.no_grad()
@BOTH
def test_no_label_is_the_null_label(kind: str):
    model = make_model(kind)
    values = random_values(model, batch_size=2, height=3, width=3)
    null = model(values, label=torch.tensor([4, 4]))
    assert torch.equal(model(values), null)
    assert not torch.allclose(model(values, label=torch.tensor([0, 1])), null)
    assert torch.equal(model.start(2, height=3, width=3)[0], model.start(2, height=3, width=3, label=LABEL[[2, 2]])[0])


@BOTH
@INPUTS
def test_every_parameter_takes_part_in_training(kind: str, num_channels: int, embedding: str):
    model = make_model(kind, num_channels=num_channels, embedding=embedding, dropout=0.1).train()
    model(random_values(model, batch_size=3, height=4, width=4), label=LABEL).square().sum().backward()
    assert unmoved(model) == []


@torch.no_grad()
@BOTH
def test_dropout_acts_in_training_and_not_in_eval(kind: str):
    model = make_model(kind, dropout=0.5)
    values = random_values(model, batch_size=2, height=3, width=3)
    assert torch.equal(model(values), model(values))
    assert not torch.equal(model.train()(values), model(values))


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_drawing_with_the_cache_equals_greedy_drawing_without(kind: str, guidance_scale: float):
    model = make_model(kind)
    expected = torch.zeros(3, 3, 3, 4, dtype=torch.int64)
    for row, column, color in itertools.product(range(3), range(4), range(3)):
        conditional, null = (model(expected, label=label)[:, color, row, column] for label in (LABEL, None))
        expected[:, color, row, column] = (null + guidance_scale * (conditional - null)).argmax(dim=-1)
    settings = {"label": LABEL, "guidance_scale": guidance_scale, "temperature": 0.0}
    assert torch.equal(drawn(model, 0, 1, 2, height=3, width=4, **settings), expected)
    assert len(expected.unique(dim=0)) > 1


@BOTH
def test_the_same_seed_gives_the_same_image_in_a_batch_of_one_and_of_three(kind: str):
    model = make_model(kind).float()
    settings = {"height": 4, "width": 3, "guidance_scale": 2.0, "temperature": 0.9, "top_k": 4, "top_p": 0.95}
    assert_own_streams(lambda part, seeds: drawn(model, *seeds, label=LABEL[part], **settings), 3)


@BOTH
def test_images_follow_the_model(kind: str):
    """4,000 images of three tokens against their exact distribution, chi-squared with 26 degrees of freedom."""
    model = make_model(kind, num_values=3, num_channels=1, embedding="table")
    every = rearrange(torch.tensor(list(itertools.product(range(3), repeat=3))), "n w -> n 1 1 w")
    with torch.no_grad():
        expected = log_likelihoods(model, every).exp() * 4000
    images = drawn(model, *range(4000), height=1, width=3)
    counts = torch.bincount((images[:, 0, 0] * torch.tensor([9, 3, 1])).sum(dim=1), minlength=27)
    kept = expected > 5
    assert ((counts - expected) ** 2 / expected)[kept].sum() < 54.1  # passed by 99.9 % of fair samples
    assert kept.sum() > 10


@BOTH
def test_drawn_images_can_be_trained_on_and_every_step_is_reported(kind: str):
    model, seen = make_model(kind), []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    values = generate_grid(model, generators=generators(0), height=2, width=2, on_token=report)
    assert seen == [(i, 12) for i in range(1, 13)]
    model(values).sum().backward()
    assert model.head.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("pixelcnn", {"channels": 16}, "share 16 channels"),
        ("row_lstm", {"channels": 15}, "multiple of 6"),
        *((kind, {"kernel_size": size}, "odd and at least 3") for kind in KINDS for size in (1, 4)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: str, setting: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make_model(kind, **setting)


def known_images(count: int, *, num_values: int, num_channels: int) -> Tensor:
    """4×4 images: each value is the sum of its left and its upper neighbor (of the color before, for all but the
    first) modulo K with probability 0.8, else uniform. So each has the same entropy, whatever came before."""
    random = torch.Generator().manual_seed(num_channels)
    padded = torch.zeros(count, num_channels, 5, 5, dtype=torch.int64)
    for row, column, color in itertools.product(range(1, 5), range(1, 5), range(num_channels)):
        upper = padded[:, color, row - 1, column] if color == 0 else padded[:, color - 1, row, column]
        sure = (padded[:, color, row, column - 1] + upper) % num_values
        uniform = torch.randint(0, num_values, (count,), generator=random)
        keep = torch.rand(count, generator=random) < 0.8
        padded[:, color, row, column] = torch.where(keep, sure, uniform)
    return padded[:, :, 1:, 1:]


@pytest.mark.parametrize(
    ("kind", "num_values", "num_channels", "embedding"),
    [("row_lstm", 3, 1, "table"), ("pixelcnn", 2, 3, "intensity")],
)
def test_a_trained_model_reaches_the_entropy_of_a_known_distribution(
    kind: str, num_values: int, num_channels: int, embedding: str
):
    torch.manual_seed(0)
    model = KINDS[kind](
        num_values=num_values, num_channels=num_channels, channels=24, num_layers=1, kernel_size=3, embedding=embedding
    )
    train, held_out = known_images(20_000, num_values=num_values, num_channels=num_channels).split([16_000, 4_000])
    steps = 250
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for step in range(steps):
        values = train[step * 64 : step * 64 + 64]
        F.cross_entropy(model(values).movedim(-1, 1), values).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        reached = float(F.cross_entropy(model(held_out).movedim(-1, 1), held_out))
    likely, other = 0.8 + 0.2 / num_values, 0.2 / num_values
    entropy = -likely * math.log(likely) - (num_values - 1) * other * math.log(other)  # in nats a value
    assert reached == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize(
    ("num_channels", "embedding"), [(3, "intensity"), (1, "table"), (1, "intensity"), (2, "table")]
)
def test_every_value_sees_all_that_come_before_it_and_nothing_else(num_channels: int, embedding: str):
    model = make_model("pixelcnn", num_channels=num_channels, embedding=embedding)
    seen = seen_places(model, height=5, width=6)
    order = places(model, height=5, width=6)
    for index, place in enumerate(order):
        assert seen[place] == set(order[:index]), place


def test_a_single_layer_sees_its_kernel_only():
    """The first layer alone: four rows above by 7 columns, and three positions to the left. Nothing reaches further,
    so what the law above finds complete is not a constant leak."""
    model = make_model("pixelcnn", num_channels=1, num_layers=0)
    seen = seen_places(model, height=7, width=9)
    for row, column, _ in places(model, height=7, width=9):
        expected = {(i, j, 0) for i in range(max(0, row - 4), row) for j in range(9) if abs(j - column) <= 3}
        expected |= {(row, j, 0) for j in range(max(0, column - 3), column)}
        assert seen[row, column, 0] == expected


@torch.no_grad()
def test_mid_gray_is_not_the_outside_of_the_image():
    """Intensity 0 is mid-gray and also what pads the convolutions; the channel of ones tells them apart."""
    model = make_model("pixelcnn", num_values=3, num_channels=1, num_layers=0)
    narrow, wide = (model(torch.ones(1, 1, 3, width, dtype=torch.int64)) for width in (4, 5))
    assert not torch.allclose(narrow[..., -1, :], wide[..., -2, :])  # here one ends and the other goes on


ENTRY_REACH = 3  # to each side of the first layer's kernel of 7, and rows above


def in_reach(place: Place, other: Place, *, left: int) -> bool:
    """Whether `other` comes before `place` and lies in its triangle.

    Each row up, the state reaches one column further to each side. To the right the first layer adds its own reach in
    the last of these rows, so d rows above it is d + 2 columns. To the left it adds that in any row, and each recurrent
    layer kernel_size // 2: `left` columns in all, and d more.
    """
    (row, column, _), (i, j, _) = place, other
    rows = row - i
    if rows == 0:
        return other < place and column - j <= left
    return rows > 0 and column - j <= left + rows and j - column <= rows - 1 + ENTRY_REACH


@pytest.mark.parametrize(("num_channels", "embedding"), [(3, "intensity"), (1, "table")])
def test_every_value_sees_the_triangle_above_it_and_nothing_else(num_channels: int, embedding: str):
    """No leak. Out of reach, as the paper says of the triangular context: what is far to the right in near rows."""
    model = make_model("row_lstm", num_channels=num_channels, embedding=embedding)
    seen = seen_places(model, height=4, width=8)
    order = places(model, height=4, width=8)
    left = ENTRY_REACH + 2 * (3 // 2)  # two recurrent layers with a kernel of 3
    for place in order:
        assert seen[place] == {other for other in order if in_reach(place, other, left=left)}, place


def test_one_step_equals_the_lstm_cell_of_torch():
    """With gates in torch's order: input, forget, content, output."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 5).double()
    x, state, memory = torch.randn(2, 3).double(), torch.randn(2, 5).double(), torch.randn(2, 5).double()
    gates = x @ cell.weight_ih.T + cell.bias_ih + state @ cell.weight_hh.T + cell.bias_hh
    let_in, keep, content, let_out = gates.chunk(4, dim=1)
    ours = lstm(torch.cat([let_out, keep, let_in, content], dim=1), memory)
    torch.testing.assert_close(ours, cell(x, (state, memory)))
