"""A subject: a few images, learned beside samples of the model that learns them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.configuration.optimization import StartConfig
from components.configuration.sampling import DiffusionSampling
from components.data.held_out import read_split
from components.data.shards import BPE, ShardEntry, ShardIndex, TextInfo, View, read_bpe, save_index
from components.data.tars import write_shard
from components.models.bundle import DESCRIPTION, WEIGHTS, ModelBundle
from components.runtime.storage.artifact import Artifact, FileEntry, upload_attempt
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, digest_of
from components.sampling.cascade import compose
from components.sampling.image_files import encode_png
from components.sampling.model import class_names
from components.sampling.plan import class_id
from components.sampling.requests import Request
from components.weights.starts import StartModel

SUBJECT = "subject.tar"


class SubjectConfig(Config):
    """A few images to learn beside samples of the model that learns them: DreamBooth's prior preservation.
    Ruiz et al. (2023), equation 2, by rows of one set, in which each image stands as often as `weight` asks for."""

    # The model that is sampled; None: the start of the base.
    init_from: StartConfig | None = None
    # Of the images: a class of the model, by name or number; a caption with a rare word for what they show: `sks dog`.
    label: int | str | None = None
    prompt: str | None = None
    # Of the samples, as `dog`.
    class_label: int | str | None = None
    class_prompt: str | None = None
    samples: int = Field(100, ge=1)
    # Of the samples' loss, as near as whole numbers of repetitions allow.
    weight: float = Field(1.0, gt=0)
    sampling: DiffusionSampling | None = None  # None: the recipe's

    def requests(self, model: ModelBundle) -> tuple[Request, Request]:
        """The words of the images and of the samples, labels by number.
        Raises ValueError, in one line, for words that the model does not take, and for none where it takes some."""
        for name, sizes in {"label": ["num_classes"], "prompt": ["text", "text_states_dim"]}.items():
            for place in (name, f"class_{name}"):
                known, given = any(map(model.network.get, sizes)), getattr(self, place)
                if known and given is None:
                    raise ValueError(f"{place} is missing: the model takes one")
                if not known and given is not None:
                    raise ValueError(f"{place} must be empty: the model takes none")
        classes = class_names(model.network, model.settings)
        own, prior = (None if label is None else class_id(label, classes) for label in (self.label, self.class_label))
        return (Request(label=own, prompt=self.prompt), Request(label=prior, prompt=self.class_prompt))


def compose_start(
    start: StartModel, sampling: DiffusionSampling, store: Store, parts: Mapping[str, Artifact]
) -> list[FileEntry]:
    """Composes a start and its other parts as a cascade, and uploads it. Raises DamagedFileError."""
    with scratch_folder("start") as place:
        model = place / "base"
        start.store.download(start.weights, model, WEIGHTS, expected=start.digest)
        (model / DESCRIPTION).write_bytes(start.store.read(start.description))
        if start.tokenizer is not None:
            (model / BPE).write_text(start.tokenizer)
        settings = {"base": sampling.model_dump(mode="json")}
        folders: dict[str, Any] = {name: part.download(place / name) for name, part in parts.items()}
        composed = compose(place / "composed", base=model, sampling=settings, **folders)
        return upload_attempt(store, composed)


def write_subject(
    start: StartModel, weight: float, index: ShardIndex, words: Sequence[Request], samples: np.ndarray, files: Store
) -> dict[str, Any]:
    """Writes the images of `index` and samples of a start, uint8 (N, H, W, 3), as a shard with index.
    `words`: of the images and of the samples. Returns facts, for the metadata."""
    model, bpe, text = start.model, read_bpe(index), index.text
    if (known := model.network.get("text")) is not None:
        bpe = start.tokenizer or bpe
        text = TextInfo(
            sha256=digest_of(bpe.encode()).sha256, vocab_size=known["vocab_size"], text_length=known["context_length"]
        )
    side = samples.shape[1]
    given = read_split(index, "train", View(side)).image
    repeats = max(1, round(len(samples) / (weight * len(given))))
    rows = list[dict[str, bytes | str]]()
    for images, own, times in zip((given, samples), words, (repeats, 1), strict=True):
        members = {"cls": str(own.label or 0).encode(), "txt": (own.prompt or "").encode()}
        rows += [{"png": encode_png(image), **members} for image in images] * times
    data = write_shard({"__key__": f"{number:06d}", **row} for number, row in enumerate(rows))
    files.write(SUBJECT, data)
    files.write(BPE, bpe.encode())
    counts = {"samples": len(rows), "train_samples": len(rows)}
    classes = tuple(class_names(model.network, model.settings)) or index.classes
    facts = {**counts, "resolution": side, "classes": classes}
    others = {
        "source": "subject",
        "labels": "index",
        "holdout_fraction": 0,
        "quarantined": 0,
        "arrays": (),
        "text": text,
        "shards": (ShardEntry(url=SUBJECT, **digest_of(data)._asdict(), **counts),),
    }
    save_index(files, index.model_copy(update=facts | others))
    return facts | {"weight": len(samples) / (repeats * len(given))}
