"""Laws of decoding."""

import pytest
import torch
from torch import Tensor

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling.autoregressive import draw, generate, token_probabilities
from components.sampling.plan import Conditions
from tests.token_models import (
    GIVEN,
    LABEL,
    NULL,
    POSITIONS,
    TEXT,
    assert_own_streams,
    generators,
    rows,
    transformer,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return transformer()


def probabilities(logits: Tensor, **filters: object) -> Tensor:
    return token_probabilities(logits, TokenSampling(**filters))


def test_the_same_seed_gives_the_same_tokens_in_a_batch_of_one_and_of_five(model: Transformer):
    sampling = TokenSampling(guidance_scale=2, temperature=0.9, top_k=10, top_p=0.95)
    assert_own_streams(
        lambda part, seeds: generate(model, rows(part), generators=generators(*seeds), sampling=sampling), 5
    )


def test_samples_follow_the_model(model: Transformer):
    """The first token of 4,000 images against its exact distribution, chi-squared with 12 degrees of freedom."""
    label, text = LABEL[:1].expand(4000), TEXT[:1].expand(4000, 5)
    with torch.no_grad():
        expected = model.start(1, label=label[:1], text=text[:1])[0].softmax(dim=-1)[0] * 4000
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    logits = expected.log().expand(4000, 13)
    drawn = draw(logits, uniforms=uniforms, sampling=TokenSampling())
    counts = torch.bincount(drawn, minlength=13)
    assert ((counts - expected) ** 2 / expected).sum() < 32.9  # passed by 99.9 % of fair samples


def test_guidance_with_equal_conditions_changes_nothing(model: Transformer):
    null, sampling = Conditions(NULL, NULL), TokenSampling(guidance_scale=4)
    plain = generate(model, null, generators=generators(*range(5)))
    guided = generate(model, null, generators=generators(*range(5)), sampling=sampling)
    assert torch.equal(guided, plain)


def test_drawn_tokens_can_be_trained_on_and_every_step_is_reported(model: Transformer):
    seen, given = [], rows(slice(1))
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    tokens = generate(model, given, generators=generators(0), on_token=report)
    assert seen == [(i, 10) for i in range(1, 11)]
    model(tokens, **given.condition).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_top_k_keeps_the_k_most_likely_tokens_and_all_that_tie_with_the_last():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert (probabilities(logits, top_k=1) > 0).tolist() == [[True, False, False, False, False]]
    assert (probabilities(logits, top_k=2) > 0).tolist() == [[True, False, True, True, False]]
    kept = probabilities(logits, top_k=3)
    torch.testing.assert_close(kept[0, [0, 2, 3]], logits[0, [0, 2, 3]].softmax(dim=0))
    assert torch.equal(probabilities(logits, top_k=99), logits.softmax(dim=-1))


def test_top_p_keeps_the_fewest_tokens_whose_mass_reaches_p_and_at_least_one():
    p = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    for top_p, kept in ((1e-6, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        out = probabilities(p.log(), top_p=top_p)
        assert out[0].nonzero().flatten().tolist() == kept
        torch.testing.assert_close(out.sum(), torch.tensor(1.0))
        torch.testing.assert_close(out[0, kept], p[0, kept] / p[0, kept].sum())
    assert (probabilities(torch.zeros(1, 4), top_p=0.5) > 0).tolist() == [[True, True, False, False]]  # ties: the lower


def test_filters_act_in_the_order_temperature_top_k_softmax_top_p():
    """After top-k the mass is renormalized: 0.5 and 0.3 are 0.625 and 0.375, so p = 0.6 keeps the first alone."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (probabilities(logits, top_k=2, top_p=0.6) > 0).tolist() == [[True, False, False]]
    assert (probabilities(logits, top_p=0.6) > 0).tolist() == [[True, True, False]]
    torch.testing.assert_close(probabilities(logits, temperature=0.5), (2 * logits).softmax(dim=-1))


def test_inversion_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.49999, 0.5, 1 - 2**-24])
    drawn = draw(logits, uniforms=uniforms, sampling=TokenSampling())
    assert drawn.tolist() == [1, 1, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_decoding_with_the_cache_equals_greedy_decoding_without(positions: str, guidance_scale: float):
    sizes = {"num_tokens": 8, "grid": (2, 4), "condition_codebook_size": 6, "condition_grid": (1, 3)}
    model = transformer(positions=positions, **sizes)
    given = GIVEN | {"condition": torch.randint(0, 6, (5, 3))}
    null = NULL | {"condition": torch.full((5, 3), 6)}
    expected = torch.zeros(5, 8, dtype=torch.int64)
    for i in range(8):
        conditional, unconditional = (model(expected, **c)[:, i] for c in (given, null))
        expected[:, i] = (unconditional + guidance_scale * (conditional - unconditional)).argmax(dim=-1)
    sampling = TokenSampling(guidance_scale=guidance_scale, temperature=0)
    tokens = generate(model, Conditions(given, null), generators=generators(*range(5)), sampling=sampling)
    assert torch.equal(tokens, expected)
    assert len(expected.unique(dim=0)) > 1
