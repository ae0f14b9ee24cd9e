"""Laws of text encoders that were trained before: of this house, and of the transformers library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from components.configuration.conditions import DatasetInfo
from components.models.bundle import ModelBundle, save_bundle
from components.runtime.storage.store import Store
from components.sampling.frozen_text import LENGTH, FrozenTextError, PretrainedText, load_frozen_text
from components.stages.precompute import TextEncoderConfig, copy_text_encoder
from components.training.frozen import caption_encoder, text_encoder
from components.weights.files import fetch_encoder
from tests.refusals import one_line
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
    if kind == "albert":
        albert = {"embedding_size": 4, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        AlbertModel(AlbertConfig(**(sizes | albert | {"num_hidden_layers": 2}))).save_pretrained(folder)
    elif kind == "bert":
        bert = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
        BertModel(BertConfig(**(sizes | bert))).save_pretrained(folder)
    else:
        T5Model(T5Config(**(sizes | {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8}))).save_pretrained(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    if length is not None:
        (folder / LENGTH).write_text(f'{{"length": {length}}}')
    return folder


@pytest.mark.parametrize("kind", ["albert", "bert", "t5"])
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


def test_a_prompt_as_typed_has_the_states_that_its_caption_had_in_training(tmp_path: Path) -> None:
    """Captions are decoded from ids of the data's tokenizer, which has no capitals; the encoder may know them."""
    config = TextEncoderConfig(uri=str(pretrained_folder(tmp_path / "bert", "bert", length=None)), length=5)
    (tmp_path / "store").mkdir()
    copy_text_encoder(config, Store(str(tmp_path / "store")))
    (folder,) = {path.parent for path in (tmp_path / "store").rglob(LENGTH)}
    text, caption = load_frozen_text(folder), CAPTIONS[0]
    assert torch.equal(text.encode([f"{caption.title()} "]), text.encode([caption]))
    assert not torch.equal(text.encode([caption]), text.encode([CAPTIONS[1]]))


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_a_prompt_that_would_lose_its_end_is_refused_with_both_numbers(kind: str, tmp_path: Path) -> None:
    """CLIP's begin and end take two of seven places."""
    if kind == "clip":
        pipeline(tmp_path)
        folder = fetch_encoder(str(tmp_path / "text_encoder"), tmp_path / "local")
        (folder / LENGTH).write_text('{"length": 7}')
    else:
        folder = pretrained_folder(tmp_path, kind)
    text = load_frozen_text(folder)
    text.check("a b c d e")
    for words in (6, 40):
        with pytest.raises(ValueError, match=f"prompt is too long: {words} tokens, the model takes at most 5"):
            text.check(" ".join("abcde"[place % 5] for place in range(words)))


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
        fetch_encoder(str(tmp_path / "nowhere"), tmp_path)
    source = pretrained_folder(tmp_path / "source", "bert", length=None)
    folder = fetch_encoder(str(source), tmp_path / "local")
    (folder / LENGTH).write_text('{"length": 4}')
    assert load_frozen_text(folder).states_shape == (4, 8)
    (source / "config.json").write_text('{"model_type": "no such model"}')
    (source / LENGTH).write_text('{"length": 5}')
    with pytest.raises(FrozenTextError, match="can't load"):
        load_frozen_text(source)


def test_old_files_of_an_encoder_are_refused_with_their_conversion(tmp_path: Path) -> None:
    """Nothing of them is opened."""
    (tmp_path / "old").mkdir()
    for name in ("config.json", "pytorch_model.bin", "spiece.model"):
        (tmp_path / "old" / name).touch()
    lacks = r"lacks tokenizer\.json, model\.safetensors: spiece\.model and pytorch_model\.bin stay closed .*README"
    with one_line(FrozenTextError, lacks):
        fetch_encoder(str(tmp_path / "old"), tmp_path)
    (tmp_path / "old/pytorch_model.bin").rename(tmp_path / "old/model.safetensors")
    with one_line(FrozenTextError, r"lacks tokenizer\.json: spiece\.model stay"):
        fetch_encoder(str(tmp_path / "old"), tmp_path)


def test_an_encoder_alone_and_in_several_files_is_that_of_the_whole_model(tmp_path: Path) -> None:
    whole = load_frozen_text(pretrained_folder(tmp_path / "whole", "t5"))
    assert isinstance(whole, PretrainedText)
    alone = T5EncoderModel.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone", max_shard_size="1KB")
    word_tokenizer().save(str(tmp_path / "alone/tokenizer.json"))
    folder = fetch_encoder(str(tmp_path / "alone"), tmp_path / "local")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / LENGTH).write_text('{"length": 5}')
    assert torch.equal(load_frozen_text(folder).encode(CAPTIONS), whole.encode(CAPTIONS))
    next(folder.glob("model-*2-of-*")).unlink()
    with pytest.raises(FrozenTextError, match=r"lacks model-00002-of-"):
        load_frozen_text(folder)


@pytest.mark.parametrize(
    ("activation", "whole"), [("relu", True), ("relu", False), ("gated-gelu", True), ("gated-gelu", False)]
)
@torch.no_grad()
def test_states_of_t5_are_those_of_its_encoder(activation: str, whole: bool, tmp_path: Path) -> None:
    """The first T5 and v1.1, with the decoder in the file or without it; pads are not attended to."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2}
    peer = (T5Model if whole else T5EncoderModel)(T5Config(feed_forward_proj=activation, **sizes)).eval()
    peer.save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / LENGTH).write_text('{"length": 7}')
    ids = torch.tensor([[*word_tokenizer().encode(CAPTIONS[0]).ids, 0, 0, 0, 0]])[:, :7]
    wanted = peer.encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state * (ids != 0)[..., None]
    torch.testing.assert_close(load_frozen_text(tmp_path).encode(CAPTIONS[:1]), wanted, rtol=1e-5, atol=1e-6)


CLIP = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP_IDS = {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 1}


def pipeline(folder: Path, **changes: object) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Text encoder and tokenizer of a folder of Stable Diffusion, apart and without tokenizer.json."""
    torch.manual_seed(0)
    network = CLIPTextModel(CLIPTextConfig(**(CLIP | CLIP_IDS | changes))).eval()
    network.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    words = ["<|startoftext|>", *(f"{letter}{end}" for letter in "abcde" for end in ("", "</w>")), "<|endoftext|>"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    stated = {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(stated))
    return network, CLIPTokenizer.from_pretrained(folder / "tokenizer")


@torch.no_grad()
def states_of_stable_diffusion(network: CLIPTextModel, tokenizer: CLIPTokenizer, *, skipped: int) -> Tensor:
    """States as its pipeline makes them: of all places, without a mask; `skipped` is its clip_skip."""
    ids: Any = tokenizer(["a b c", ""], padding="max_length", max_length=7, return_tensors="pt")["input_ids"]
    found = network(ids, output_hidden_states=True)
    return network.final_layer_norm(found.hidden_states[-1 - skipped]) if skipped else found.last_hidden_state


@pytest.mark.parametrize("skipped", [0, 1])
def test_clip_of_stable_diffusion_gives_a_state_for_every_pad(skipped: int, tmp_path: Path) -> None:
    wanted = states_of_stable_diffusion(*pipeline(tmp_path / "pipe"), skipped=skipped)
    config = TextEncoderConfig(
        uri=str(tmp_path / "pipe/text_encoder"), length=7, pads="attended", skipped_layers=skipped
    )
    (tmp_path / "store").mkdir()
    _, shape = copy_text_encoder(config, Store(str(tmp_path / "store")))
    assert shape == (7, 8)
    (folder,) = {path.parent for path in (tmp_path / "store").rglob(LENGTH)}
    text = load_frozen_text(folder)
    assert torch.equal(text.encode(["a b c", ""]), wanted)
    assert (wanted != 0).any(-1).all()


def test_the_text_tower_of_a_whole_clip_is_taken(tmp_path: Path) -> None:
    network, _ = pipeline(tmp_path / "pipe")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    whole = CLIPModel(CLIPConfig(text_config=CLIP | CLIP_IDS, vision_config=vision))
    whole.text_model.load_state_dict(network.state_dict())
    whole.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "pipe/tokenizer").rename(tmp_path / "tokenizer")
    found = []
    for place in (tmp_path / "pipe/text_encoder", tmp_path / "text_encoder"):
        (place.parent / "tokenizer").mkdir(exist_ok=True)
        for file in (tmp_path / "tokenizer").iterdir():
            (place.parent / "tokenizer" / file.name).write_bytes(file.read_bytes())
        folder = fetch_encoder(str(place), tmp_path / f"local-{len(found)}")
        (folder / LENGTH).write_text('{"length": 7}')
        found.append(load_frozen_text(folder).encode(["a b c"]))
    assert torch.equal(*found)


def test_layers_of_a_model_that_repeats_one_are_not_skipped(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path, "albert")
    (folder / LENGTH).write_text('{"length": 5, "skipped_layers": 1}')
    with pytest.raises(FrozenTextError, match=r"skipped_layers must be 0 for the model in .* no list of 2 layers"):
        load_frozen_text(folder)


def test_missing_weights_and_layers_are_one_line(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path, "t5")
    (folder / LENGTH).write_text('{"length": 5, "skipped_layers": 1}')
    with pytest.raises(FrozenTextError, match=r"skipped_layers must be in \[0, 0\] .*: 1"):
        load_frozen_text(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FrozenTextError, match=r"lacks 1 weights, first encoder\.final_layer_norm\.weight"):
        load_frozen_text(folder)
