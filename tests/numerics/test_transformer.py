"""Laws of the prior's transformer."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from components.configuration.conditions import IMAGES, TokenGrid
from components.configuration.priors import PriorTraining
from components.models.layers import grid_rotation, rotate
from components.models.losses.cross_entropy import token_loss
from components.models.transformer import Transformer, _causal_mask
from tests.token_models import POSITIONS, heard, reach, train_on, unit_gain, unmoved

CONDITIONS = {
    "nothing": {},
    "label": {"num_classes": 5},
    "text": {"vocab_size": 20, "text_length": 6},
    "label and text": {"num_classes": 5, "vocab_size": 20, "text_length": 6},
    "image": {"condition_codebook_size": 7, "condition_grid": (2, 2)},
    "label and image": {"num_classes": 5, "condition_codebook_size": 7, "condition_grid": (2, 2)},
}
CONDITIONS["all"] = CONDITIONS["label and text"] | CONDITIONS["image"]
CONDITIONS["all, text learned too"] = CONDITIONS["all"] | {"predict_text": True}
VARIANTS = {
    f"{name}, {positions}": settings | {"positions": positions}
    for positions in POSITIONS
    for name, settings in CONDITIONS.items()
}
TEXT = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 7, 2]])
IMAGE = torch.tensor([[0, 3, 6, 1], [7, 7, 7, 7], [5, 2, 2, 4]])  # the second is the null image


def make_transformer(*, codebook_size: int = 11, num_tokens: int = 9, **settings: object) -> Transformer:
    torch.manual_seed(0)
    sizes = {"codebook_size": codebook_size, "num_tokens": num_tokens, "grid": (math.isqrt(num_tokens),) * 2}
    return unit_gain(Transformer(**sizes | {"model_dim": 32, "num_layers": 2, "num_heads": 4} | settings))


def condition_of(transformer: Transformer, *, batch_size: int = 3) -> dict[str, Tensor]:
    every = {"label": torch.tensor([0, 4, 5]), "text": TEXT, "condition": IMAGE}
    takes = (transformer.null_label, transformer.text_length, transformer.condition_length)
    return {name: every[name][:batch_size] for name, taken in zip(every, takes, strict=True) if taken}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_depend_on_all_earlier_tokens_and_on_no_later_one(settings: dict[str, int]):
    transformer = make_transformer(**settings)
    vectors = heard(transformer, "token_embedding")
    logits = transformer(torch.randint(0, 11, (1, 9)), **condition_of(transformer, batch_size=1))
    for i in range(9):
        assert reach(logits[0, i], vectors) == {"token_embedding": [j < i for j in range(8)]}


@torch.no_grad()
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_probabilities_of_all_images_sum_to_one(settings: dict[str, int]):
    transformer = make_transformer(codebook_size=3, num_tokens=4, **settings)
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    condition = {name: value[1:2].expand(81, *value.shape[1:]) for name, value in condition_of(transformer).items()}
    log_probabilities = transformer(tokens, **condition).log_softmax(dim=-1).gather(-1, tokens[..., None])
    assert log_probabilities.std() > 0.1
    torch.testing.assert_close(log_probabilities.sum(dim=(1, 2)).exp().sum(), torch.tensor(1.0))


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


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_parameter_takes_part_in_training(positions: str):
    transformer = make_transformer(**CONDITIONS["all, text learned too"], positions=positions, dropout=0.1).train()
    logits = transformer(torch.randint(0, 11, (3, 9)), **condition_of(transformer), with_text=True)
    (logits.tokens.square().sum() + logits.text.square().sum()).backward()
    assert unmoved(transformer) == []


@torch.no_grad()
def test_dropout_acts_in_training_and_not_in_eval():
    transformer = make_transformer(dropout=0.5)
    tokens = torch.randint(0, 11, (2, 9))
    assert torch.equal(transformer(tokens), transformer(tokens))
    assert not torch.equal(transformer.train()(tokens), transformer(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"vocab_size": 20}, "both or neither"),
        ({"condition_grid": (2, 2)}, "both or neither"),
        ({"grid": (2, 3)}, "2×3 does not have num_tokens 4"),
        ({"num_heads": 16, "positions": "rotary_2d"}, "multiple of 4, not 2"),
        ({"predict_text": True}, "needs vocab_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Transformer(
            **({"codebook_size": 4, "num_tokens": 4, "model_dim": 32, "num_layers": 1, "num_heads": 2} | settings)
        )


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("text", {"text": TEXT[:, :5]}, "text_length is 6"),
        ("text", {}, "text_length is 6"),
        ("image", {"condition": IMAGE[:, :3]}, "condition_grid is 2×2"),
        ("image", {}, "condition of None, condition_grid is 2×2"),
    ],
)
def test_a_text_or_a_condition_image_of_another_size_is_refused(kind: str, given: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        make_transformer(**CONDITIONS[kind])(torch.zeros(3, 9, dtype=torch.int64), **given)


@torch.no_grad()
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_cached_logits_equal_those_of_the_full_forward(settings: dict[str, object]):
    transformer = make_transformer(**settings).double()
    condition, tokens = condition_of(transformer), torch.randint(0, 11, (3, 9))
    full = transformer(tokens, **condition)
    assert full.dtype == torch.float64
    for done in (0, 1, 4, 8):
        logits, cache = transformer.start(3, **condition, tokens=tokens[:, :done])
        torch.testing.assert_close(logits, full[:, done], atol=1e-12, rtol=0)
        for i in range(done, 8):
            logits = transformer.step(tokens[:, i], cache=cache)
            torch.testing.assert_close(logits, full[:, i + 1], atol=1e-12, rtol=0)
        with pytest.raises(IndexError, match="cache is full"):
            transformer.step(tokens[:, 8], cache=cache)


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_depend_on_every_token_of_every_condition_but_pads(positions: str):
    transformer = make_transformer(**CONDITIONS["all"], positions=positions)
    vectors = heard(transformer, "class_embedding", "text_embedding", "condition_embedding")
    logits = transformer(torch.randint(0, 11, (1, 9)), **condition_of(transformer, batch_size=1))
    for i in range(9):
        reached = reach(logits[0, i], vectors)
        assert reached["text_embedding"] == [True, True, True, True, False, False]
        assert (reached["class_embedding"], reached["condition_embedding"]) == (True, [True] * 4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_text_logits_depend_on_earlier_words_and_on_nothing_else(positions: str):
    transformer = make_transformer(**CONDITIONS["all, text learned too"], positions=positions)
    condition, tokens = condition_of(transformer), torch.randint(0, 11, (3, 9))
    logits = transformer(tokens, **condition, with_text=True)
    assert torch.equal(logits.tokens, transformer(tokens, **condition))
    other = {"label": torch.tensor([1, 2, 3]), "condition": IMAGE.flip(0)}
    torch.testing.assert_close(transformer(tokens.flip(0), **condition | other, with_text=True).text, logits.text)
    vectors = heard(transformer, "text_embedding")
    whole = {name: value[2:] for name, value in condition.items()}  # a text without pads
    logits = transformer(tokens[2:], **whole, with_text=True)
    for i in range(5):
        assert reach(logits.text[0, i], vectors) == {"text_embedding": [j <= i for j in range(6)]}


@torch.no_grad()
def test_probabilities_of_all_texts_and_images_together_sum_to_one():
    settings = {"vocab_size": 4, "text_length": 3, "predict_text": True, "num_classes": 2}
    transformer = make_transformer(codebook_size=2, num_tokens=4, **settings)
    pairs = [
        ((1, *text), tokens)
        for text in itertools.product(range(4), repeat=2)
        for tokens in itertools.product(range(2), repeat=4)
    ]
    text, tokens = (torch.tensor(column) for column in zip(*pairs, strict=True))
    logits = transformer(tokens, text=text, label=torch.ones(len(pairs), dtype=torch.int64), with_text=True)
    of_text = logits.text.log_softmax(dim=-1).gather(-1, text[:, 1:, None]).sum(dim=(1, 2))
    of_tokens = logits.tokens.log_softmax(dim=-1).gather(-1, tokens[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close((of_text + of_tokens).exp().sum(), torch.tensor(1.0))


@torch.no_grad()
def test_places_of_two_dimensions_know_rows_and_columns():
    transformer = make_transformer(num_tokens=6, grid=(2, 3), positions="learned_2d")
    zeros = torch.zeros(1, 6, 32)
    added = transformer._place(zeros, 0)[0]
    for i in range(6):
        torch.testing.assert_close(added[i], transformer.row_position[i // 3] + transformer.column_position[i % 3])
    torch.testing.assert_close(transformer._place(zeros[:, :2], 3)[0], added[3:5])


def test_products_of_rotated_vectors_depend_on_the_difference_of_places_alone():
    rotation = grid_rotation(6, 7, head_dim=8).double().unflatten(0, (6, 7))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(query: tuple[int, int], key: tuple[int, int]) -> Tensor:
        turned = [rotate(x, rotation[place][None]) for x, place in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum()

    for row, column in ((0, 0), (1, 0), (0, 1), (2, 3)):
        shifted = product((row, column), (row + 1, column + 2))
        torch.testing.assert_close(shifted, product((0, 0), (1, 2)), atol=1e-5, rtol=0)
    assert not torch.isclose(product((0, 0), (0, 1)), product((0, 0), (1, 0)))
    assert not torch.isclose(product((0, 0), (0, 1)), product((0, 1), (0, 0)))
    torch.testing.assert_close(product((0, 0), (0, 0)), (q * k).sum())


@torch.no_grad()
def test_conditions_are_not_turned_and_tokens_are_turned_by_their_own_place():
    transformer = make_transformer(**CONDITIONS["all"], positions="rotary_2d")
    x = torch.randn(1, 4, 11 + 9, 8)
    turned = rotate(x, transformer.rotation)
    assert torch.equal(turned[:, :, :11], x[:, :, :11])
    torch.testing.assert_close(turned[:, :, 11:], rotate(x[:, :, 11:], grid_rotation(3, 3, head_dim=8)))


@torch.no_grad()
def test_rotary_logits_stay_when_all_places_are_shifted_and_conditions_anchor_the_image():
    """Rotations alone are relative; conditions are not turned, so they tell the first row from the last."""
    transformer = make_transformer(**CONDITIONS["all"], positions="rotary_2d").double()
    condition, tokens = condition_of(transformer), torch.randint(0, 11, (3, 9))
    before, rotation = transformer(tokens, **condition), transformer.rotation
    shift = grid_rotation(4, 6, head_dim=8).double()[-1]  # by three rows and five columns
    cos, sin = (rotation * shift).diff(dim=-1).neg(), (rotation * shift.flip(-1)).sum(dim=-1, keepdim=True)
    shifted = torch.cat([cos, sin], dim=-1)
    transformer.rotation = shifted
    torch.testing.assert_close(transformer(tokens, **condition), before, atol=1e-4, rtol=0)
    transformer.rotation = torch.cat([rotation[:11], shifted[11:]])
    assert not torch.allclose(transformer(tokens, **condition), before, atol=1e-2)


@torch.no_grad()
def test_logits_equal_those_of_gpt_2_with_the_same_weights():
    ours = make_transformer(num_classes=5)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 9, "activation_function": "gelu"}
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=11, tie_word_embeddings=False, **settings)).eval()
    weights = {"transformer.wpe.weight": ours.position, "lm_head.weight": ours.head.weight}
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj"}
    names |= {"expand": "mlp.c_fc", "contract": "mlp.c_proj"}
    for i, block in enumerate(ours.blocks):
        for name, parameter in block.named_parameters():
            module, _, kind = name.rpartition(".")
            weights[f"transformer.h.{i}.{names[module]}.{kind}"] = parameter.T if parameter.ndim == 2 else parameter
    weights |= {f"transformer.ln_f.{name}": parameter for name, parameter in ours.norm_out.named_parameters()}
    missing = peer.load_state_dict({name: value.contiguous() for name, value in weights.items()}, strict=False)
    assert missing.missing_keys == ["transformer.wte.weight"]
    assert missing.unexpected_keys == []
    tokens, label = torch.randint(0, 11, (3, 9)), torch.tensor([0, 3, 5])
    inputs = torch.cat([ours.class_embedding(label)[:, None], ours.token_embedding(tokens[:, :-1])], dim=1)
    torch.testing.assert_close(ours(tokens, label=label), peer(inputs_embeds=inputs).logits, atol=1e-5, rtol=0)


def test_a_transformer_trained_on_a_known_distribution_reaches_its_entropy():
    """Images of 2×2 tokens whose last one tells whether the first two are equal, most of the time."""
    torch.manual_seed(0)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    likely = (images[:, 3] == (images[:, 0] == images[:, 1]).long()).float()
    distribution = (torch.tensor([0.6, 0.3, 0.1])[images[:, :3]].prod(dim=1) * (0.05 + likely)).double()
    distribution /= distribution.sum()
    entropy = -(distribution * distribution.log()).sum() / 4  # nats a token
    transformer = Transformer(codebook_size=3, num_tokens=4, model_dim=32, num_layers=2, num_heads=4)
    train_on(transformer, distribution, lambda step, rows: token_loss(transformer(images[rows]), tokens=images[rows]))
    with torch.no_grad():
        log_p = transformer(images).log_softmax(dim=-1).gather(-1, images[..., None]).sum(dim=(1, 2)).double()
    cross_entropy = -(distribution * log_p).sum() / 4
    assert entropy <= cross_entropy < 1.02 * entropy


@pytest.mark.parametrize("positions", ["learned", "learned_2d", "rotary_2d"])
def test_without_a_class_token_the_last_token_of_the_text_predicts_the_first(positions: Any) -> None:
    """As in minDALL-E; steps with a cache are the teacher-forced pass, and pads are tokens as others."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 9, "num_tokens": 6, "grid": (2, 3), "model_dim": 16, "num_layers": 2}
    text: dict[str, Any] = {"vocab_size": 7, "text_length": 4, "num_heads": 2}
    network = Transformer(**sizes, **text, positions=positions, class_token=False, attend_padding=True).eval()
    assert network.num_conditions == 4
    tokens, words = torch.randint(9, (2, 6)), torch.tensor([[3, 1, 0, 0], [5, 0, 0, 0]])
    wanted = network(tokens, text=words)
    logits, cache = network.start(2, text=words)
    at = network.start(2, text=words)[1]
    found, there = [logits], [logits]
    for place in range(5):
        found.append(network.step(tokens[:, place], cache=cache))
        there.append(network.step_at(tokens[:, place], torch.tensor(4 + place), cache=at))
    torch.testing.assert_close(torch.stack(found, dim=1), wanted)
    torch.testing.assert_close(torch.stack(there, dim=1), wanted)
    words[:, 3] = 6
    assert not torch.allclose(network(tokens, text=words), wanted), "a pad is seen"
    assert "class_embedding.weight" not in network.state_dict()


def test_a_class_token_is_left_out_only_where_something_else_comes_first() -> None:
    sizes: dict[str, Any] = {"codebook_size": 9, "num_tokens": 4, "model_dim": 16, "num_layers": 1, "num_heads": 2}
    text = {"vocab_size": 7, "text_length": 4}
    for refused in ({}, text | {"num_classes": 3}):
        with pytest.raises(ValueError, match="class_token=False needs a causal transformer with text"):
            Transformer(**sizes, **refused, class_token=False)
    numbers = {"model_dim": 16, "num_layers": 1, "num_heads": 2, "total_steps": 1, "global_batch_size": 2}
    numbers |= {"learning_rate": 1e-3, "warmup_steps": 0}
    with pytest.raises(ValueError, match="class_token false knows no label"):
        PriorTraining.of(**numbers, class_token=False)
    usual = PriorTraining.of(**numbers)
    arguments = usual.network_arguments(IMAGES, TokenGrid(codebook_size=9, height=2, width=2))
    assert not {"class_token", "attend_padding"} & set(arguments), "models say what they said before"
