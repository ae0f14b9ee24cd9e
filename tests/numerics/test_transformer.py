"""Laws of the prior's transformer."""

import itertools

import pytest
import torch
from torch import Tensor

from components.models.transformer import Transformer, _causal_mask

CONDITIONS = {
    "nothing": {},
    "label": {"num_classes": 5},
    "text": {"vocab_size": 20, "text_length": 6},
    "label and text": {"num_classes": 5, "vocab_size": 20, "text_length": 6},
}
TEXT = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 7, 2]])


def make_transformer(*, codebook_size: int = 11, num_tokens: int = 9, **settings: object) -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(
        codebook_size=codebook_size, num_tokens=num_tokens, model_dim=32, num_layers=2, num_heads=4, **settings
    ).eval()
    for parameter in transformer.parameters():  # weights of unit gain, so that every part shows in the logits
        if parameter.ndim == 2:
            parameter.data.normal_().mul_(0.3)
    return transformer


def condition_of(transformer: Transformer, *, batch_size: int = 3) -> dict[str, Tensor]:
    condition = {}
    if transformer.null_label:
        condition["label"] = torch.tensor([0, 4, 5])[:batch_size]
    if transformer.text_length:
        condition["text"] = TEXT[:batch_size]
    return condition


@torch.no_grad()
@pytest.mark.parametrize("settings", CONDITIONS.values(), ids=CONDITIONS)
def test_cached_logits_equal_those_of_the_full_forward(settings: dict[str, int]):
    transformer = make_transformer(**settings)
    condition = condition_of(transformer)
    tokens = torch.randint(0, 11, (3, 9))
    logits, cache = transformer.start(3, **condition)
    stepped = [logits, *(transformer.step(tokens[:, i], cache=cache) for i in range(8))]
    torch.testing.assert_close(torch.stack(stepped, dim=1), transformer(tokens, **condition), atol=1.6e-5, rtol=0)
    with pytest.raises(IndexError, match="cache is full"):
        transformer.step(tokens[:, 8], cache=cache)


@pytest.mark.parametrize("settings", CONDITIONS.values(), ids=CONDITIONS)
def test_logits_depend_on_all_earlier_tokens_and_on_no_later_one(settings: dict[str, int]):
    transformer = make_transformer(**settings)
    condition = condition_of(transformer, batch_size=1)
    tokens = torch.randint(0, 11, (1, 9))
    vectors = {}
    transformer.token_embedding.register_forward_hook(
        lambda _module, _inputs, output: vectors.update(image=output.requires_grad_())
    )
    logits = transformer(tokens, **condition)
    for i in range(9):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), vectors["image"], retain_graph=True)
        reached = gradient[0].abs().sum(dim=1) > 0
        assert reached.tolist() == [j < i for j in range(8)]


@torch.no_grad()
@pytest.mark.parametrize("settings", CONDITIONS.values(), ids=CONDITIONS)
def test_probabilities_of_all_pictures_sum_to_one(settings: dict[str, int]):
    transformer = make_transformer(codebook_size=3, num_tokens=4, **settings)
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    condition = {name: value[1:2].expand(81, *value.shape[1:]) for name, value in condition_of(transformer).items()}
    log_probabilities = transformer(tokens, **condition).log_softmax(dim=-1).gather(-1, tokens[..., None])
    assert log_probabilities.std() > 0.1
    torch.testing.assert_close(log_probabilities.sum(dim=(1, 2)).exp().sum(), torch.tensor(1.0))


@torch.no_grad()
def test_pads_do_not_show_in_the_logits_and_words_do():
    transformer = make_transformer(**CONDITIONS["text"])
    tokens = torch.randint(0, 11, (3, 9))
    before = transformer(tokens, text=TEXT)
    transformer.text_embedding.weight[0] += torch.randn(32)
    torch.testing.assert_close(transformer(tokens, text=TEXT), before)
    transformer.text_embedding.weight[7] += torch.randn(32)
    changed = (transformer(tokens, text=TEXT) - before).abs().amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == [True, False, True]


def test_no_row_of_the_mask_sees_nothing():
    """Kernels differ on a softmax over nothing: some give zeros, some NaN."""
    mask = _causal_mask(torch.tensor([False, False, True, False])[None, None, None])[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_text_of_pads_only_gives_finite_logits_and_gradients():
    transformer = make_transformer(**CONDITIONS["text"])
    logits = transformer(torch.zeros(1, 9, dtype=torch.int64), text=torch.zeros(1, 6, dtype=torch.int64))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in transformer.parameters())


@torch.no_grad()
def test_no_label_is_the_null_label():
    transformer = make_transformer(num_classes=5)
    tokens = torch.randint(0, 11, (2, 9))
    null = transformer(tokens, label=torch.tensor([5, 5]))
    assert torch.equal(transformer(tokens), null)
    assert not torch.allclose(transformer(tokens, label=torch.tensor([0, 1])), null)


def test_every_parameter_takes_part_in_training():
    transformer = make_transformer(**CONDITIONS["label and text"], dropout=0.1).train()
    transformer(torch.randint(0, 11, (3, 9)), **condition_of(transformer)).square().sum().backward()
    still = [name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@torch.no_grad()
def test_dropout_acts_in_training_and_not_in_eval():
    transformer = make_transformer(dropout=0.5)
    tokens = torch.randint(0, 11, (2, 9))
    assert torch.equal(transformer(tokens), transformer(tokens))
    assert not torch.equal(transformer.train()(tokens), transformer(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_heads": 5}, "multiple of num_heads"), ({"vocab_size": 20}, "both or neither")],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Transformer(
            **({"codebook_size": 4, "num_tokens": 4, "model_dim": 32, "num_layers": 1, "num_heads": 2} | settings)
        )


def test_a_text_of_another_length_is_refused():
    transformer = make_transformer(**CONDITIONS["text"])
    with pytest.raises(ValueError, match="text_length is 6"):
        transformer(torch.zeros(3, 9, dtype=torch.int64), text=TEXT[:, :5])
    with pytest.raises(ValueError, match="text_length is 6"):
        transformer(torch.zeros(3, 9, dtype=torch.int64))
