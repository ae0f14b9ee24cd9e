"""Laws of Muon, which moves matrices by momentum with singular values of about 1."""

import copy
import math

import pytest
import torch
from torch import nn

from components.configuration.optimization import OptimizationConfig
from components.training.muon import hidden_matrices, matrix, orthogonal
from components.training.optim import make_optimizer

RATE, DECAY = 0.01, 0.1


def of_muon(network: nn.Module, **changes: object) -> torch.optim.AdamW:
    numbers = {"total_steps": 100, "global_batch_size": 8, "learning_rate": RATE, "weight_decay": DECAY}
    return make_optimizer(network, OptimizationConfig(**(numbers | {"optimizer": "muon"} | changes)))


@pytest.mark.parametrize("shape", [(24, 24), (16, 96), (96, 16), (8, 8, 3, 3)])
def test_an_update_has_the_singular_vectors_of_a_gradient_and_values_near_to_one(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix(gradient), full_matrices=False)
    in_its_axes = left.T @ matrix(orthogonal(gradient)) @ right.T
    torch.testing.assert_close(in_its_axes, in_its_axes.diag().diag(), rtol=0, atol=1e-3)
    found = in_its_axes.diag()[values > 0.02 * values.norm()]
    assert len(found) > len(values) / 2
    assert 0.6 < found.min() <= found.max() < 1.25


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_steps_are_those_of_torch_whose_products_are_rounded_to_bf16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    own, theirs = nn.Linear(*shape[::-1], bias=False), nn.Linear(*shape[::-1], bias=False)
    theirs.load_state_dict(own.state_dict())
    start = own.weight.detach().clone()
    optimizers = [
        of_muon(own),
        torch.optim.Muon(theirs.parameters(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for network, optimizer in zip((own, theirs), optimizers, strict=True):
            network.weight.grad = gradient.clone()
            optimizer.step()
    difference = (own.weight - theirs.weight).norm() / (theirs.weight - start).norm()
    assert 0 < difference < 0.02


def test_embeddings_what_shares_them_norms_and_layers_to_images_are_for_adamw() -> None:
    network = nn.ModuleDict(
        {
            "table": nn.Embedding(20, 16),
            "tied": nn.Linear(16, 20, bias=False),
            "map": nn.Linear(16, 12),
            "norm": nn.LayerNorm(16),
            "inside": nn.Conv2d(8, 16, 3),
            "out": nn.Conv2d(16, 3, 3),
            "frozen": nn.Linear(16, 16),
        }
    )
    network["tied"].weight = network["table"].weight
    network["frozen"].requires_grad_(False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert [names[id(p)] for p in hidden_matrices(network)] == ["map.weight", "inside.weight"]
    groups = of_muon(network, parts={"inside": {"learning_rate": 0.5}}).param_groups
    kinds = {
        names[id(p)]: (group.get("orthogonal", False), group.get("factor", 1))
        for group in groups
        for p in group["params"]
    }
    assert kinds["map.weight"] == (True, 1)
    assert kinds["inside.weight"] == (True, 0.5)
    assert {name for name, (by_muon, _) in kinds.items() if not by_muon} == {
        "table.weight",
        "map.bias",
        "norm.weight",
        "norm.bias",
        "inside.bias",
        "out.weight",
        "out.bias",
    }


def test_all_else_is_moved_as_adamw_moves_it_and_a_refused_step_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    plain = copy.deepcopy(network)
    optimizer, adamw = of_muon(network), of_muon(plain, optimizer="adamw")
    for refused in (0.0, 1.0, 0.0):
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
        for each in (optimizer, adamw):
            parameters = (network if each is optimizer else plain).parameters()
            for index, parameter in enumerate(parameters):
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.grad = drawn * (math.nan if refused else 1.0)
            each.found_inf = torch.tensor(refused)
            each.step()
        if refused:
            torch.testing.assert_close((network.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name)) == (name != "0.weight")
