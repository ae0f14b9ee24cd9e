"""Which split a file belongs to by its name, as published sets are laid out, and which files are read.

A set keeps a share of its own out (`holdout_fraction`, by the hash of each key), so that only the training files are
read; what is left is named, and a glob reads it.
"""

import re
from collections.abc import Mapping, Sequence

WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def split_word(path: str) -> str | None:
    """The split that a path names (`data/test-00000-of-00002.parquet`), in its last part that names one."""
    for part in reversed(path.split("/")):
        for word in re.split(r"[^A-Za-z]+", part.rpartition(".")[0] or part):
            if word.lower() in WORDS:
                return WORDS[word.lower()]
    return None


def training_files(paths: Sequence[str]) -> tuple[list[str], str | None]:
    """The files that are read, and a line that says what is used for what; no line if all of them are read.

    Where no file is named as training, all are read.
    """
    by_split: dict[str | None, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_word(path), []).append(path)
    if "train" not in by_split or len(by_split) == 1:
        return list(paths), None
    return by_split["train"], splits_note(by_split)


def splits_note(by_split: Mapping[str | None, Sequence[str]]) -> str:
    """Says how many files of each split there are and that those to train on are read."""
    counts = {name or "the rest": f"{len(paths):,} file{'s' * (len(paths) > 1)}" for name, paths in by_split.items()}
    others = " and ".join(f"{name} ({count})" for name, count in counts.items() if name != "train")
    return (
        f"train is read ({counts['train']}) and {others} is not: holdout_fraction of train is held out of training; "
        "to read others, name their folder or a glob"
    )
