"""Import of a pretrained text encoder into the store, next to all other models.

Trainings and samples find the encoder there.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from components.configuration.config import Config
from components.runtime.storage.artifact import Artifact, FileEntry, upload_attempt
from components.runtime.storage.store import SCRATCH, Store, StoreError, absolute, list_url
from components.sampling.frozen_text import (
    LENGTH,
    PRETRAINED_FILES,
    FrozenTextError,
    check_transformers,
    load_frozen_text,
)
from components.stages.context import StageContext


class TextEncoderConfig(Config):
    """Address of the text encoder, and the length of a text in tokens."""

    # folder, local or in object storage, that transformers' save_pretrained wrote; the worker may be in another folder
    uri: Annotated[str, Field(min_length=1), AfterValidator(absolute)]
    length: int = Field(32, ge=2)  # tokens of a text, of the encoder's own tokenizer; longer texts lose their end


def import_text_encoder(config: TextEncoderConfig, context: StageContext) -> Artifact:
    """Copies the encoder's files into a model artifact.

    The artifact's metadata has the shape of a text's states.

    Raises FrozenTextError, in one line, if there is no such encoder or it can't be loaded.
    """
    with context.pool() as pool:
        entries, (length, width) = pool.call(partial(copy_text_encoder, config, context.store))
    return context.commit("model", entries=entries, metadata={"text_states_length": length, "text_states_dim": width})


def copy_text_encoder(config: TextEncoderConfig, store: Store) -> tuple[list[FileEntry], tuple[int, int]]:
    """Copies the encoder's files to the stage's store and loads the encoder once. Runs in a worker.

    Returns the entries of the files and the shape of a text's states. Raises FrozenTextError.
    """
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}text-encoder-") as place:
        folder = fetch(config.uri, Path(place))
        (folder / LENGTH).write_text(json.dumps({"length": config.length}))
        return upload_attempt(store, folder), load_frozen_text(folder).states_shape


def fetch(uri: str, folder: Path) -> Path:
    """Copies the needed files of an encoder from `uri` to `folder`.

    Raises FrozenTextError if a file is missing.
    """
    check_files(uri)
    try:
        for name in PRETRAINED_FILES:
            Store(uri).download(name, folder, name)
    except (OSError, StoreError) as error:
        raise FrozenTextError(f"the text encoder at {uri} can't be read: {error}; give another uri") from error
    return folder


def check_text_encoder(config: TextEncoderConfig) -> None:
    """Cheap check before anything is started, by a listing.

    Raises FrozenTextError, in one line, if there is no encoder, or nothing here that could load it.
    """
    check_transformers()
    check_files(config.uri)


def check_files(uri: str) -> None:
    """Raise FrozenTextError if a file of a pretrained encoder is missing at `uri`."""
    try:
        found = {info.path for info in list_url(uri)}
    except (OSError, StoreError) as error:
        raise FrozenTextError(f"the text encoder at {uri} can't be read: {error}; give another uri") from error
    if missing := [name for name in PRETRAINED_FILES if name not in found]:
        raise FrozenTextError(
            f"{uri} holds no text encoder, it lacks {', '.join(missing)}: give a folder that transformers wrote by "
            "save_pretrained of a model and its fast tokenizer, or train a contrastive encoder and take its text tower"
        )
