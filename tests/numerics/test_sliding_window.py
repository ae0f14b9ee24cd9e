"""Laws of images larger than the trained grid."""

import pytest
import torch
from torch import Tensor

from components.models.transformer import Transformer
from components.sampling.autoregressive import draw, generate
from components.sampling.sliding_window import generate_window, window_of

NULL_TEXT = torch.tensor([1, 2, 0, 0, 0])


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        codebook_size=13,
        num_tokens=16,
        grid=(4, 4),
        positions="learned_2d",
        model_dim=32,
        num_layers=2,
        num_heads=4,
        num_classes=5,
        vocab_size=12,
        text_length=5,
        condition_codebook_size=6,
        condition_grid=(2, 2),
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_().mul_(0.3)
    return model


def conditions(batch_size: int, *, condition_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "label": torch.arange(batch_size),
        "text": torch.tensor([[1, 7, 9, 2, 0]]).expand(batch_size, 5),
        "condition": torch.randint(0, 6, (batch_size, condition_tokens), generator=generator),
    }


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_on_the_trained_grid_it_is_generate(transformer: Transformer, guidance_scale: float):
    settings = {"null_text": NULL_TEXT, "guidance_scale": guidance_scale, "top_k": 10}
    given = conditions(3, condition_tokens=4)
    plain = generate(transformer, generators=generators(3), **given, **settings)
    assert torch.equal(generate_window(transformer, grid=(4, 4), generators=generators(3), **given, **settings), plain)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 6), (4, 6), (6, 4)])
def test_each_token_is_drawn_from_its_window_and_from_nothing_else(transformer: Transformer, grid: tuple[int, int]):
    """Against a full forward pass of each window, the condition image cut by hand; both guided."""
    height, width = grid
    given = conditions(2, condition_tokens=height * width // 4)
    settings = {"null_text": NULL_TEXT, "guidance_scale": 2.0, "top_k": 10, "temperature": 0.9}
    made = generate_window(transformer, grid=grid, generators=generators(2), **given, **settings).view(2, *grid)
    uniforms = torch.stack([torch.rand(height * width, generator=g) for g in generators(2)], dim=1)
    image = given["condition"].view(2, height // 2, width // 2)
    null = {"text": NULL_TEXT.expand(2, 5), "condition": torch.full((2, 4), 6)}
    for row in range(height):
        for column in range(width):
            top, left = (min(max(at - 2, 0), size - 4) for at, size in ((row, height), (column, width)))
            part = image[:, top // 2 : top // 2 + 2, left // 2 : left // 2 + 2].reshape(2, 4)
            tokens = made[:, top : top + 4, left : left + 4].reshape(2, 16).clone()
            place = 4 * (row - top) + column - left
            tokens[:, place:] = 0  # a causal network hears nothing of them; they are not there yet
            conditional = transformer(tokens, **given | {"condition": part})[:, place]
            unconditional = transformer(tokens, **null)[:, place]
            expected = draw(
                torch.lerp(unconditional, conditional, 2.0),
                uniforms=uniforms[row * width + column],
                temperature=0.9,
                top_k=10,
                top_p=None,
            )
            assert torch.equal(made[:, row, column], expected), (row, column)


def test_windows_of_sixteen_follow_the_published_rule():
    """taming-transformers: local index i up to 8, 16 - (H - i) near the end, 8 in between."""
    for column in range(40):
        window = window_of(column, (1, 40), (1, 16))
        local = column if column <= 8 else 16 - (40 - column) if 40 - column < 8 else 8
        assert (window.left, window.place) == (column - local, local)


def test_a_grid_or_condition_that_does_not_fit_is_refused(transformer: Transformer):
    with pytest.raises(ValueError, match="3×4 is smaller than the 4×4"):
        generate_window(transformer, grid=(3, 4), generators=generators(1), **conditions(1, condition_tokens=4))
    for grid, tokens in (((8, 8), 4), ((5, 4), 4)):
        with pytest.raises(ValueError, match="a condition of 4 tokens does not fit"):
            generate_window(transformer, grid=grid, generators=generators(1), **conditions(1, condition_tokens=tokens))
