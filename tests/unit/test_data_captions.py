"""Laws of caption encoding: fixed length, frozen special ids, the same bytes from the same captions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from components.data import ingest
from components.data.ingest import train_bpe
from components.sampling.image_files import BOS, EOS, PAD, encode_text
from tests.image_sets import ingest_here

CAPTIONS = ["a red square", "a green circle", "two blue squares", "ein grünes Dreieck"] * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.from_str(train_bpe(CAPTIONS, vocab_size=300))


def test_a_caption_is_bos_ids_eos_and_pads_whatever_its_length_and_its_case(bpe: Tokenizer) -> None:
    ids, upper = encode_text(bpe, ["a red square", "A RED Square"], text_length=24)
    length = int((ids != PAD).sum())
    assert (ids.dtype, ids[0], ids[length - 1]) == (np.int64, BOS, EOS)
    assert (ids[1 : length - 1] > 3).all()
    np.testing.assert_array_equal(upper, ids)
    np.testing.assert_array_equal(encode_text(bpe, [""], text_length=5), [[BOS, EOS, PAD, PAD, PAD]])
    (cut,) = encode_text(bpe, ["square " * 50], text_length=8)
    assert cut[-1] == EOS
    assert (cut != PAD).all()


def test_any_text_can_be_encoded_and_decoded_again(bpe: Tokenizer) -> None:
    for caption in ("日本語", "smile 😀", "naïve"):
        ids = encode_text(bpe, [caption], text_length=64)[0]
        assert bpe.decode(ids.tolist()).strip() == caption


def test_neither_the_order_of_captions_nor_the_process_nor_a_file_changes_an_id(tmp_path: Path, bpe: Tokenizer) -> None:
    program = "import sys; from components.data.ingest import train_bpe as train; "
    program += "sys.stdout.write(train(eval(sys.argv[1]), vocab_size=300))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, repr(CAPTIONS[::-1])], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout == train_bpe(CAPTIONS, vocab_size=300)
    (tmp_path / "bpe.json").write_text(elsewhere.stdout)
    read = encode_text(Tokenizer.from_file(str(tmp_path / "bpe.json")), CAPTIONS, text_length=9)
    np.testing.assert_array_equal(read, encode_text(bpe, CAPTIONS, text_length=9))


@pytest.mark.parametrize("vocab_size", [260, 280, 300])
def test_no_id_reaches_the_size_of_the_vocabulary(vocab_size: int) -> None:
    bpe = Tokenizer.from_str(train_bpe(CAPTIONS, vocab_size=vocab_size))
    assert bpe.get_vocab_size() <= vocab_size
    assert encode_text(bpe, [*CAPTIONS, "😀"], text_length=32).max() < vocab_size


@pytest.mark.parametrize("samples", [200, 1000])
def test_the_bpe_of_a_set_of_any_size_is_trained_on_a_bounded_even_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """A driver that holds all captions ends at some tens of millions."""
    trained: list[str] = []

    def train(captions: list[str], *, vocab_size: int) -> str:
        trained.extend(captions)
        return train_bpe(captions, vocab_size=vocab_size)

    monkeypatch.setattr(ingest, "BPE_CAPTIONS", 100)
    monkeypatch.setattr(ingest, "train_bpe", train)
    index = ingest_here("scenes", None, tmp_path, samples_per_shard=20, holdout_fraction=0, limit=samples)
    assert len(index.shards) == samples // 20
    assert 50 <= len(trained) <= 100
