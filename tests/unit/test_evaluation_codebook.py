"""Laws of the colors of codes and of index grids."""

import numpy as np
import pytest
import torch

from components.sampling.images import code_colors, index_grids
from components.training.learner import make_network
from tests.tiny_autoencoders import config_of


def test_near_codes_have_near_colors_whatever_their_order() -> None:
    line = torch.linspace(-3, 3, 50)[:, None] * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([5.0, 0.0, 1.0])
    colors = code_colors(line)
    assert colors.abs().max() == 1
    steps = colors[1:, 0].sub(colors[:-1, 0]).abs()
    torch.testing.assert_close(steps, torch.full_like(steps, 2 / 49))
    torch.testing.assert_close(colors[:, 1:], torch.zeros(50, 2))  # a line has one component
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(code_colors(line[order]), colors[order])


def test_equal_codes_have_equal_colors_whatever_their_order_and_number_and_others_do_not() -> None:
    codes = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    colors = code_colors(torch.cat([codes, codes[:5]]))
    torch.testing.assert_close(colors[20:], colors[:5], rtol=0, atol=0)
    assert len(colors.unique(dim=0)) == 20
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(300, 6, generator=generator)
    rows = torch.randint(300, (900,), generator=generator)
    rows = torch.cat([rows, torch.arange(300)])[torch.randperm(1200, generator=generator)]
    torch.testing.assert_close(code_colors(codes[rows]), code_colors(codes)[rows], rtol=0, atol=0)
    torch.testing.assert_close(code_colors(torch.ones(4, 2)), torch.zeros(4, 3))


@pytest.mark.parametrize("name", ["vq_vae", "vq_vae_ema", "dvae", "fsq"])
def test_a_place_of_the_index_grid_has_the_color_of_its_code(name: str) -> None:
    network = make_network(config_of(name)).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    grids = index_grids(network, images)
    indices = network.tokenize(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert grids.shape == (3, 3, *indices.shape[1:])
    colors = grids.permute(0, 2, 3, 1).reshape(-1, 3)
    same = indices.flatten()[:, None] == indices.flatten()
    torch.testing.assert_close((colors[:, None] == colors).all(dim=-1), same)
