"""Laws of the masked transformer, of its masks and of its decoding."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.configuration.sampling import MaskedTokenSampling
from components.models.losses.cross_entropy import masked_token_loss
from components.models.transformer import MaskedTransformer
from components.sampling.maskgit import gumbel, masked_counts, maskgit
from components.training.randomness import Draws
from components.training.tasks.prior import evaluation_masks, random_masks, training_masks
from tests.token_models import CONDITIONED as TOKENS
from tests.token_models import NULL as WITHOUT
from tests.token_models import (
    POSITIONS,
    TEXT,
    assert_own_streams,
    generators,
    heard,
    reach,
    train_on,
    unit_gain,
    unmoved,
)
from tests.token_models import rows as rows_of

N, K = 9, 11
CONDITIONS = {"label": torch.tensor([0, 3, 4, 1, 5]), "text": TEXT}
CONDITIONS |= {"condition": torch.tensor([[0, 1], [2, 3], [6, 6], [5, 5], [4, 0]])}
NULL = WITHOUT | {"condition": torch.full((5, 2), 6)}
CONDITIONED = TOKENS | {"condition_codebook_size": 6, "condition_grid": (1, 2)}


def make_transformer(positions: str = "learned", **settings: object) -> MaskedTransformer:
    torch.manual_seed(0)
    sizes = {"codebook_size": K, "num_tokens": N, "grid": (3, 3), "model_dim": 32, "num_layers": 2, "num_heads": 4}
    return unit_gain(MaskedTransformer(**sizes | {"positions": positions} | settings))


@pytest.fixture(scope="module")
def transformer() -> MaskedTransformer:
    return make_transformer(**CONDITIONED)


def drawn(model: MaskedTransformer, *seeds: int, rows: slice = slice(5), steps: int = 4, **settings: Any) -> Tensor:
    on_step = settings.pop("on_step", None)
    sampling = MaskedTokenSampling(num_inference_steps=steps, **settings)
    given = rows_of(rows, CONDITIONS, NULL)
    return maskgit(model, given, generators=generators(*seeds), sampling=sampling, on_step=on_step)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_logit_hears_all_tokens_and_conditions_but_pads_and_every_parameter_is_trained(positions: str):
    model = make_transformer(positions, **CONDITIONED).train()
    vectors = heard(model, "class_embedding", "text_embedding", "condition_embedding", "token_embedding")
    logits = model(torch.randint(0, K + 1, (5, N)), **CONDITIONS)
    assert logits.shape == (5, N, K)
    for i in range(N):
        reached = reach(logits[0, i], vectors)
        assert reached.pop("text_embedding") == [True] * 4 + [False]
        assert all(torch.tensor(places).all() for places in reached.values())
    logits.square().sum().backward()
    assert unmoved(model) == []


@torch.no_grad()
def test_equal_tokens_are_told_apart_by_their_places():
    for positions in POSITIONS:
        logits = make_transformer(positions, num_classes=5)(torch.full((1, N), K))[0]
        assert torch.pdist(logits).min() > 1e-3, positions


def test_only_masked_tokens_have_a_loss_and_each_image_weighs_the_same():
    logits, tokens = torch.randn(3, N, K, requires_grad=True), torch.randint(0, K, (3, N))
    masked = torch.zeros(3, N, dtype=torch.bool)
    masked[0, 2] = masked[1, :5] = masked[2] = True
    loss = masked_token_loss(logits, tokens=tokens, masked=masked, label_smoothing=0.1)
    log_p = logits.log_softmax(dim=-1)
    nats = -(0.9 * log_p.gather(-1, tokens[..., None])[..., 0] + 0.1 * log_p.mean(dim=-1))
    expected = torch.stack([nats[0, 2], nats[1, :5].mean(), nats[2].mean()]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(dim=-1) > 0, masked)


def test_mask_ratios_follow_the_cosine_of_a_uniform_number():
    """P(count <= n) = P(N cos(π/2 · r) <= n) = 1 - 2/π arccos(n / N), by the Kolmogorov distance of 4,000 draws."""
    counts = training_masks(Draws(3), torch.arange(4000), 64).sum(dim=1)
    assert counts.min() >= 1
    share = torch.bincount(counts, minlength=65)[1:].cumsum(dim=0) / 4000
    expected = 1 - 2 / math.pi * torch.arccos(torch.arange(1, 65) / 64)
    assert (share - expected).abs().max() < 0.03
    ordered = evaluation_masks(Draws(3), torch.arange(4000), 8, number=0).sum(dim=1)
    assert (torch.bincount(ordered, minlength=9)[1:] - 500).abs().max() < 100
    assert (ordered == 0).sum() == 0


def test_masks_are_functions_of_seed_and_position_and_fair_to_every_place():
    position = torch.arange(2000)
    masks = training_masks(Draws(3), position, N)
    assert torch.equal(training_masks(Draws(3), position[5:9], N), masks[5:9])
    assert not torch.equal(training_masks(Draws(4), position, N), masks)
    fair = random_masks(Draws(0), position, torch.full((2000,), 3), num_tokens=N, stream="fair")
    assert (fair.sum(dim=1) == 3).all()
    assert (fair.float().mean(dim=0) - 1 / 3).abs().max() < 0.045


def test_the_schedule_keeps_a_token_each_step_and_leaves_none():
    for num_tokens in range(1, 65):
        for steps in range(1, num_tokens + 1):
            counts = [num_tokens, *masked_counts(num_tokens, steps=steps)]
            assert len(counts) == steps + 1
            assert counts[-1] == 0
            assert all(before > after for before, after in itertools.pairwise(counts))
        assert counts == list(range(num_tokens, -1, -1)), "as many steps as tokens: one at a time"
    for steps in (8, 12):
        cosine = [math.floor(256 * math.cos(math.pi / 2 * t / steps)) for t in range(1, steps)]
        assert masked_counts(256, steps=steps) == [*cosine, 0]


@pytest.mark.parametrize("steps", [1, 4, N])
def test_every_place_is_filled_exactly_once(transformer: MaskedTransformer, steps: int):
    seen = [torch.full((5, N), K)]
    settings = {"guidance_scale": 2.0, "on_step": lambda step, tokens: seen.append(tokens.clone())}
    tokens = drawn(transformer, *range(5), steps=steps, **settings)
    assert len(seen) == steps + 1
    for before, after, left in zip(seen, seen[1:], masked_counts(N, steps=steps), strict=False):
        assert ((after == K).sum(dim=1) == left).all()
        assert torch.equal(after[before != K], before[before != K])
    assert torch.equal(seen[-1], tokens)
    assert 0 <= tokens.min() <= tokens.max() < K


def test_the_same_seed_gives_the_same_tokens_in_a_batch_of_one_and_of_five(transformer: MaskedTransformer):
    settings = {"temperature": 0.9, "top_k": 8, "top_p": 0.95, "guidance_scale": 2.0}
    assert_own_streams(lambda rows, seeds: drawn(transformer, *seeds, rows=rows, **settings), 5)


@torch.no_grad()
@pytest.mark.parametrize("choice_temperature", [0.0, 4.5])
def test_each_step_keeps_what_is_surest_by_log_p_and_fading_gumbel_noise(
    transformer: MaskedTransformer, choice_temperature: float
):
    expected, streams = torch.full((5, N), K), [torch.Generator().manual_seed(seed) for seed in range(5)]
    for step, left in enumerate(masked_counts(N, steps=3), start=1):
        conditional, unconditional = transformer(expected, **CONDITIONS), transformer(expected, **NULL)
        log_p = (unconditional + 2 * (conditional - unconditional)).log_softmax(dim=-1)
        for image in range(5):
            noise = -torch.log(-torch.log(torch.rand(2, N, generator=streams[image])[1]))
            confidence = log_p[image].max(dim=-1).values + choice_temperature * (1 - step / 3) * noise
            places = [place for place in range(N) if expected[image, place] == K]
            places.sort(key=lambda place, of=confidence: -float(of[place]))
            for place in places[: len(places) - left]:
                expected[image, place] = log_p[image, place].argmax()
    settings = {"steps": 3, "temperature": 0.0, "choice_temperature": choice_temperature, "guidance_scale": 2.0}
    assert torch.equal(drawn(transformer, *range(5), **settings), expected)
    settings["choice_temperature"] = 4.5 - choice_temperature
    assert not torch.equal(drawn(transformer, *range(5), **settings), expected)


def test_gumbel_noise_has_its_mean_and_variance_and_is_always_finite():
    noise = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert gumbel(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_drawn_tokens_can_be_trained_on(transformer: MaskedTransformer):
    one = {name: value[:1] for name, value in CONDITIONS.items()}
    tokens = drawn(transformer, 0, rows=slice(1), steps=3)
    transformer(tokens, **one).sum().backward()
    assert transformer.head.weight.grad.abs().sum() > 0


def bits_in_random_order(transformer: MaskedTransformer, images: Tensor, distribution: Tensor) -> Tensor:
    """Nats a token, exactly: over all images and all masks, each number of masked tokens as likely as any other."""
    num_tokens, total = images.shape[1], torch.zeros((), dtype=torch.float64)
    for masked in itertools.product((False, True), repeat=num_tokens):
        count = sum(masked)
        if count:
            hidden = torch.tensor(masked)
            logits = transformer(images.masked_fill(hidden, transformer.mask_token))
            nats = -logits.log_softmax(dim=-1).gather(-1, images[..., None])[..., 0].double()
            share = 1 / num_tokens / math.comb(num_tokens, count)
            total += share * (distribution * nats[:, hidden].mean(dim=1)).sum()
    return total


def test_trained_on_a_known_distribution_it_reaches_its_entropy_in_random_order():
    torch.manual_seed(0)
    images = torch.tensor(list(itertools.product(range(3), repeat=3)))
    distribution = torch.tensor([0.6, 0.3, 0.1])[images[:, :2]].prod(dim=1).double()
    distribution *= torch.where(images[:, 2] == (images[:, 0] + images[:, 1]) % 3, 0.8, 0.1)
    entropy = -(distribution * distribution.log()).sum() / 3
    model = MaskedTransformer(codebook_size=3, num_tokens=3, model_dim=32, num_layers=2, num_heads=4)

    def loss(step: int, rows: Tensor) -> Tensor:
        masked = evaluation_masks(Draws(step), torch.arange(256), 3, number=0)
        logits = model(images[rows].masked_fill(masked, 3))
        return masked_token_loss(logits, tokens=images[rows], masked=masked, label_smoothing=0.0)

    train_on(model, distribution, loss)
    with torch.no_grad():
        bound = bits_in_random_order(model, images, distribution)
    assert entropy <= bound < 1.02 * entropy
