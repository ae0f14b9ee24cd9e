"""Laws of images larger than the trained grid."""

from functools import partial

import pytest
import torch

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling.autoregressive import draw, draw_in_order, generate, window_logits, window_of
from components.sampling.plan import Conditions
from tests.token_models import NULL, generators, transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    sizes = {"num_tokens": 16, "grid": (4, 4), "condition_codebook_size": 6, "condition_grid": (2, 2)}
    return transformer(positions="learned_2d", **sizes)


def conditions(batch_size: int, *, condition_tokens: int) -> Conditions:
    generator, shape = torch.Generator().manual_seed(3), (batch_size, condition_tokens)
    given = {
        "label": torch.arange(batch_size),
        "text": torch.tensor([[1, 7, 9, 2, 0]]).expand(batch_size, 5),
        "condition": torch.randint(0, 6, shape, generator=generator),
    }
    null = {"label": torch.full((batch_size,), 5), "text": NULL["text"][0].expand(batch_size, 5)}
    return Conditions(given, null | {"condition": torch.full(shape, 6)})


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_on_the_trained_grid_it_is_generate(model: Transformer, guidance_scale: float):
    sampling, given = TokenSampling(guidance_scale=guidance_scale, top_k=10), conditions(3, condition_tokens=4)
    plain = generate(model, given, generators=generators(0, 1, 2), sampling=sampling)
    steps, device = partial(window_logits, model, (4, 4)), torch.device("cpu")
    windows = draw_in_order(steps, 16, given, generators=generators(0, 1, 2), sampling=sampling, device=device)
    assert torch.equal(windows, plain)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 6), (4, 6), (6, 4)])
def test_each_token_is_drawn_from_its_window_and_from_nothing_else(model: Transformer, grid: tuple[int, int]):
    """Against a full forward pass of each window, the condition image cut by hand; both guided."""
    height, width = grid
    given = conditions(2, condition_tokens=height * width // 4)
    sampling = TokenSampling(guidance_scale=2, top_k=10, temperature=0.9)
    made = generate(model, given, grid=grid, generators=generators(0, 1), sampling=sampling).view(2, *grid)
    uniforms = torch.stack([torch.rand(height * width, generator=g) for g in generators(0, 1)], dim=1)
    image = given.condition["condition"].view(2, height // 2, width // 2)
    null = {"text": NULL["text"][0].expand(2, 5), "condition": torch.full((2, 4), 6)}
    for row in range(height):
        for column in range(width):
            top, left = (min(max(at - 2, 0), size - 4) for at, size in ((row, height), (column, width)))
            part = image[:, top // 2 : top // 2 + 2, left // 2 : left // 2 + 2].reshape(2, 4)
            tokens = made[:, top : top + 4, left : left + 4].reshape(2, 16).clone()
            place = 4 * (row - top) + column - left
            tokens[:, place:] = 0  # a causal network hears nothing of them; they are not there yet
            conditional = model(tokens, **given.condition | {"condition": part})[:, place]
            unconditional = model(tokens, **null)[:, place]
            logits = torch.lerp(unconditional, conditional, 2.0)
            expected = draw(logits, uniforms=uniforms[row * width + column], sampling=sampling)
            assert torch.equal(made[:, row, column], expected), (row, column)


def test_windows_of_sixteen_follow_the_published_rule():
    """taming-transformers: local index i up to 8, 16 - (H - i) near the end, 8 in between."""
    for column in range(40):
        window = window_of(column, (1, 40), (1, 16))
        local = column if column <= 8 else 16 - (40 - column) if 40 - column < 8 else 8
        assert (window.left, window.place) == (column - local, local)


def test_a_condition_that_does_not_fit_a_grid_is_refused(model: Transformer):
    for grid in ((8, 8), (5, 4)):
        with pytest.raises(ValueError, match="a condition of 4 tokens does not fit"):
            generate(model, conditions(1, condition_tokens=4), grid=grid, generators=generators(0))
