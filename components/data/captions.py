"""Training of the caption tokenizer; encoding lives in `components/sampling/text_encoding.py`."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from components.sampling.text_encoding import SPECIAL_TOKENS


def train_bpe(captions: Iterable[str], *, vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich et al., 2016) and return it as the text of `bpe.json`.

    The same set of captions gives the same bytes, in whatever order they come.

    Args:
        captions: the captions of the training split.
        vocab_size: number of ids with the four special tokens and the 256 bytes, so at least 260; small sets of
            captions may give fewer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.to_str()
