"""Captions as token ids of fixed length, by a byte-level BPE of the `tokenizers` library.

Imported by the data reader and by the packed model alike, so that both see the same ids.
Shapes: B captions, L text_length.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # their place is their id


def load_bpe(path: Path | str) -> Tokenizer:
    """The tokenizer in a `bpe.json` file."""
    return Tokenizer.from_file(str(path))


def parse_bpe(content: str) -> Tokenizer:
    """The tokenizer in the text of a `bpe.json` file."""
    return Tokenizer.from_str(content)


def encode_text(tokenizer: Tokenizer, captions: Sequence[str], *, text_length: int) -> np.ndarray:  # (B, L) int64
    """Encodes captions as `<bos> caption <eos> <pad>…`; long captions lose their end.
    The `<eos>` is never cut. The null text of classifier-free guidance is the encoding of ""."""
    ids = np.full((len(captions), text_length), PAD, dtype=np.int64)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(captions), add_special_tokens=False), strict=True):
        tokens = [BOS, *encoding.ids[: text_length - 2], EOS]
        row[: len(tokens)] = tokens
    return ids
