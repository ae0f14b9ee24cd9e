"""Laws of text encoders that were trained before: of this house, and of the transformers library."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, T5Config, T5Model

from components.configuration.conditions import DatasetInfo
from components.models.bundle import ModelBundle, save_bundle
from components.sampling.frozen_text import LENGTH, FrozenTextError, PretrainedText, load_frozen_text
from components.stages.precompute import fetch
from components.training.frozen import caption_encoder, text_encoder
from tests.tiny_text_image import CAPTIONS, contrastive_config, frozen_contrastive, tiny_bpe

WORDS = ("[PAD]", "[UNK]", *sorted({word for caption in CAPTIONS for word in caption.split()}))


def word_tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def pretrained_folder(folder: Path, kind: str, *, length: int | None = 5) -> Path:
    """A small model as transformers saves it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_layers": 1}
    if kind == "bert":
        bert = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
        BertModel(BertConfig(**(sizes | bert))).save_pretrained(folder)
    else:
        T5Model(T5Config(**(sizes | {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8}))).save_pretrained(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    if length is not None:
        (folder / LENGTH).write_text(f'{{"length": {length}}}')
    return folder


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_pretrained_encoder_gives_states_with_zeros_at_padding(kind: str, tmp_path: Path) -> None:
    text = load_frozen_text(pretrained_folder(tmp_path, kind))
    assert isinstance(text, PretrainedText)
    assert text.states_shape == (5, 8)
    states = text.encode(["a red circle", "a red circle a red circle", ""])
    assert states.shape == (3, 5, 8)
    assert (states != 0).any(dim=2).sum(dim=1).tolist() == [3, 5, 1]
    assert not states[0, 3:].any()
    assert not states[2, 1:].any()
    torch.testing.assert_close(text.encode(["a red circle"])[0], states[0])


def test_captions_reach_a_pretrained_encoder_through_the_ids_of_the_data(tmp_path: Path) -> None:
    text, bpe = load_frozen_text(pretrained_folder(tmp_path, "bert")), tiny_bpe()
    encode = caption_encoder(text, bpe)
    ids = [[1, *bpe.encode(caption, add_special_tokens=False).ids, 2] for caption in CAPTIONS]
    longest = max(map(len, ids))
    column = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    columns = encode({"text": column, "position": torch.arange(len(ids))})
    torch.testing.assert_close(columns["text_states"], text.encode(CAPTIONS))
    torch.testing.assert_close(columns["null_text_states"][1], text.encode([""])[0])


def test_a_contrastive_models_text_tower_is_found_by_its_description(tmp_path: Path) -> None:
    wanted = frozen_contrastive()
    info = DatasetInfo(num_classes=3, vocab_size=wanted.text.bpe.get_vocab_size(), text_length=6)
    arguments = contrastive_config().network_arguments(info)
    save_bundle(tmp_path, ModelBundle("contrastive", arguments, {}, wanted.network))
    (tmp_path / "bpe.json").write_text(wanted.text.bpe.to_str())
    found = load_frozen_text(tmp_path)
    torch.testing.assert_close(found.encode(CAPTIONS), wanted.encode(CAPTIONS))
    ids = wanted.text.encode(CAPTIONS)
    columns = text_encoder(wanted)({"text": ids, "position": torch.arange(len(ids))})
    torch.testing.assert_close(columns["text_embedding"], wanted.conditions(CAPTIONS)["text_embedding"])


def test_files_of_a_pretrained_encoder_are_fetched_and_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(FrozenTextError, match=r"lacks config\.json, tokenizer\.json, model\.safetensors"):
        load_frozen_text(tmp_path)
    with pytest.raises(FrozenTextError, match="save_pretrained"):
        fetch(str(tmp_path / "nowhere"), tmp_path)
    source = pretrained_folder(tmp_path / "source", "bert", length=None)
    folder = fetch(str(source), tmp_path / "local")
    (folder / LENGTH).write_text('{"length": 4}')
    assert load_frozen_text(folder).states_shape == (4, 8)
    (source / "config.json").write_text('{"model_type": "no such model"}')
    (source / LENGTH).write_text('{"length": 5}')
    with pytest.raises(FrozenTextError, match="can't load"):
        load_frozen_text(source)
