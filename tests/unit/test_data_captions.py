"""Laws of caption encoding: fixed length, frozen special ids, the same bytes from the same captions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from components.data.ingest import train_bpe
from components.sampling.image_files import BOS, EOS, PAD, encode_text, load_bpe, parse_bpe

CAPTIONS = ["a red square", "a green circle", "two blue squares", "ein grünes Dreieck"] * 3


def test_a_caption_is_bos_ids_eos_and_pads() -> None:
    (ids,) = encode_text(parse_bpe(train_bpe(CAPTIONS, vocab_size=300)), ["a red square"], text_length=24)
    length = int((ids != PAD).sum())
    assert ids.dtype == np.int64
    assert ids[0] == BOS
    assert ids[length - 1] == EOS
    assert (ids[1 : length - 1] > 3).all()


def test_the_null_text_is_bos_eos_pads() -> None:
    ids = encode_text(parse_bpe(train_bpe(CAPTIONS, vocab_size=300)), [""], text_length=5)
    np.testing.assert_array_equal(ids, [[BOS, EOS, PAD, PAD, PAD]])


def test_a_long_caption_loses_its_end_and_keeps_its_eos() -> None:
    (ids,) = encode_text(parse_bpe(train_bpe(CAPTIONS, vocab_size=300)), ["square " * 50], text_length=8)
    assert ids[-1] == EOS
    assert (ids != PAD).all()


def test_any_text_can_be_encoded_and_decoded_again() -> None:
    bpe = parse_bpe(train_bpe(CAPTIONS, vocab_size=300))
    for caption in ("日本語", "smile 😀", "naïve"):
        ids = encode_text(bpe, [caption], text_length=64)[0]
        assert bpe.decode(ids.tolist()).strip() == caption


def test_the_order_of_captions_does_not_matter_and_neither_does_the_process() -> None:
    program = "import sys; from components.data.ingest import train_bpe; sys.stdout.write(train_bpe(eval(sys.argv[1]), vocab_size=300))"  # noqa: E501
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, repr(CAPTIONS[::-1])], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout == train_bpe(CAPTIONS, vocab_size=300)


def test_case_does_not_matter() -> None:
    bpe = parse_bpe(train_bpe(CAPTIONS, vocab_size=300))
    upper, lower = encode_text(bpe, ["A RED Square", "a red square"], text_length=12)
    np.testing.assert_array_equal(upper, lower)


def test_a_file_gives_the_same_ids(tmp_path: Path) -> None:
    content = train_bpe(CAPTIONS, vocab_size=300)
    (tmp_path / "bpe.json").write_text(content)
    one, other = load_bpe(tmp_path / "bpe.json"), parse_bpe(content)
    assert encode_text(one, CAPTIONS, text_length=9).tolist() == encode_text(other, CAPTIONS, text_length=9).tolist()


@pytest.mark.parametrize("vocab_size", [260, 280, 300])
def test_no_id_reaches_the_size_of_the_vocabulary(vocab_size: int) -> None:
    bpe = parse_bpe(train_bpe(CAPTIONS, vocab_size=vocab_size))
    assert bpe.get_vocab_size() <= vocab_size
    assert encode_text(bpe, [*CAPTIONS, "😀"], text_length=32).max() < vocab_size
