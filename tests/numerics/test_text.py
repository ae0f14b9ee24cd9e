"""Laws of the text encoder; torch.nn.TransformerEncoderLayer is the independent implementation."""

import pytest
import torch
from torch import nn

from components.models.layers import TextTransformer
from components.sampling.image_files import TextIds, encode_text
from components.sampling.model import TextCondition
from tests.foreign_weights import words_of

TEXT = torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]])


def encoder(num_layers: int = 2, **changes: bool) -> TextTransformer:
    return TextTransformer(vocab_size=20, context_length=8, model_dim=16, num_layers=num_layers, num_heads=2, **changes)


def test_a_block_equals_the_pre_norm_encoder_layer_of_torch():
    block = encoder(1).blocks[0]
    peer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    mine = {name: tensor.detach() for name, tensor in block.named_parameters()}
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear1.": "mlp.1.", "linear2.": "mlp.3."}
    names |= {"norm1.": "attention_norm.", "norm2.": "mlp.0."}
    peer.load_state_dict({a + part: mine[b + part] for a, b in names.items() for part in ("weight", "bias")})
    x, padding = torch.randn(3, 8, 16), TEXT == 0
    ours = block(x, ~padding[:, None, None])
    theirs = peer.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], theirs[~padding])


def test_more_padding_changes_nothing_and_the_last_real_token_is_pooled():
    model = encoder()
    short, long = model(TEXT[:, :5]), model(TEXT)
    torch.testing.assert_close(short.pooled, long.pooled)
    torch.testing.assert_close(short.states[0], long.states[0, :5])
    last = torch.stack([long.states[row, place] for row, place in enumerate((4, 2, 1))])
    torch.testing.assert_close(long.pooled, last)
    swapped = TEXT[:1, [0, 2, 1, 3, 4, 5, 6, 7]]  # the order of words counts
    assert (model(TEXT[:1]).pooled - model(swapped).pooled).abs().max() > 1e-4


def test_learned_padding_fills_every_text_up_and_the_last_place_is_pooled():
    """GLIDE: the padding is attended to, so that each place of it has a meaning."""
    model = encoder(learned_padding=True)
    states, pooled = model(TEXT[:, :5])
    assert states.shape == (3, 8, 16)
    assert model.visible(TEXT[:, :5]).all()
    torch.testing.assert_close(states, model(TEXT).states)
    torch.testing.assert_close(pooled, states[:, -1])
    with torch.no_grad():
        model.padding_embedding[6, :8] += 1
    changed = (model(TEXT).pooled - pooled).abs().amax(1)
    assert (changed > 1e-4).all()


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="at most 8"):
        encoder()(torch.ones(1, 9, dtype=torch.int64))


def test_a_published_tokenizer_has_ids_of_its_own_around_a_caption() -> None:
    bpe = words_of("a", "b", "<|endoftext|>").bpe
    found = encode_text(bpe, ["a b a b", "a", ""], text_length=3, special=TextIds(None, None, 2))
    assert found.tolist() == [[0, 1, 0], [0, 2, 2], [2, 2, 2]]
    assert TextCondition(bpe, 3, TextIds(None, None, 2)).most_tokens == 3


def test_a_pad_is_what_the_model_says_and_0_may_be_a_word() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 4, "context_length": 3, "model_dim": 8, "num_layers": 1, "num_heads": 2}
    text = TextTransformer(**sizes, learned_padding=True, pad_id=3).eval()
    short, long = text(torch.tensor([[0]])), text(torch.tensor([[0, 3, 3]]))
    torch.testing.assert_close(short.states, long.states)
    assert not torch.allclose(text(torch.tensor([[0, 0, 3]])).states, long.states)
