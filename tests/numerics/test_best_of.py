"""Laws of the best of several candidates."""

import pytest
import torch
from torch import Tensor

from components.models.transformer import Transformer
from components.sampling.generators.tokens import mutual_information
from components.sampling.plan import best_of
from tests.token_models import unit_gain

SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.9], [3.0, -1.0, 2.0, 3.0], [-5.0, -4.0, -3.0, -2.0]])  # (B, n)


def test_the_candidate_of_the_highest_score_is_kept_and_the_first_of_equal_ones():
    candidates = torch.randint(0, 100, (4, 3, 2, 2))
    seen = iter(SCORES.T)
    best = best_of(lambda k: candidates[k], lambda tokens: next(seen), n=4)
    assert torch.equal(best, torch.stack([candidates[1, 0], candidates[0, 1], candidates[3, 2]]))
    best = best_of(lambda k: torch.tensor([[k, 1], [2, -k]]), lambda tokens: tokens.float().sum(dim=1), n=5)
    assert best.tolist() == [[4, 1], [2, 0]]


def test_one_candidate_is_the_best_whatever_its_score_and_of_several_no_score_that_is_no_number_wins():
    best = best_of(lambda k: torch.ones(2, 3) * k, lambda tokens: torch.tensor([torch.nan, -torch.inf]), n=1)
    assert not best.any()
    scores = iter(torch.tensor([[torch.nan, 1.0], [0.5, torch.nan]]))
    assert best_of(lambda k: torch.tensor([k, k]), lambda tokens: next(scores), n=2).tolist() == [1, 0]


@pytest.fixture
def transformer() -> Transformer:
    sizes = {"codebook_size": 7, "num_tokens": 4, "model_dim": 16, "num_layers": 1, "num_heads": 2}
    return unit_gain(Transformer(**sizes, num_classes=3))


def log_likelihood(transformer: Transformer, tokens: Tensor, label: Tensor) -> Tensor:
    """By the chain rule, token after token."""
    total = torch.zeros(len(tokens))
    for i in range(4):
        log_p = transformer(tokens, label=label)[:, i].log_softmax(dim=-1)
        total += log_p[torch.arange(len(tokens)), tokens[:, i]]
    return total


@torch.no_grad()
def test_mutual_information_is_the_difference_of_two_log_likelihoods(transformer: Transformer):
    tokens, label, null = torch.randint(0, 7, (5, 4)), torch.tensor([0, 1, 2, 0, 3]), torch.full((5,), 3)
    score = mutual_information(transformer, tokens, condition={"label": label}, null={"label": null})
    expected = log_likelihood(transformer, tokens, label) - log_likelihood(transformer, tokens, null)
    torch.testing.assert_close(score, expected)
    assert score[4].abs() < 1e-5
    assert score[:4].abs().min() > 0
