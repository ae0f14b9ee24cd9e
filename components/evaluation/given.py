"""Figures of given images against a reference, both as users have them (`data/given.py`).

A reference may be published statistics: an npz file with `mu` and `sigma`, beside images or alone, as the reference
sets of ADM (Dhariwal & Nichol, 2021). Those stand for the distance of `inception`, the network and protocol that they
are of. Features are computed in this process, and kept in a folder `features` beside the images, where that can be
written. A trained model has a reference of its own: the held-out images of its set, which is found by the keys of
inputs that manifests name.
Shapes: N images, D features.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from components.configuration.config import refuse
from components.data.given import NUMPY, given_images, open_archive
from components.data.held_out import joined_words, read_split, shard_words
from components.data.shards import ShardIndex, View
from components.evaluation import features
from components.evaluation.clip_score import ClipScore
from components.evaluation.generated import measured_requests
from components.evaluation.image_sets import ImagePart, ShardImages
from components.evaluation.metrics import METRICS, Compared, Gaussian, counted, gaussian_from, gaussian_of, measured_row
from components.runtime.pool import write_job
from components.runtime.storage.artifact import Artifact, load_artifact, look_at
from components.runtime.storage.connection import StoreError, shown
from components.runtime.storage.store import Store, absolute
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png
from components.sampling.requests import Request

logger = logging.getLogger("cascade")


def published_gaussian(uri: str) -> Gaussian | None:
    """The Gaussian of `mu` and `sigma` of an npz file; None for anything else."""
    if not uri.endswith(NUMPY):
        return None
    with open_archive(absolute(uri)) as archive:
        if not {"mu.npy", "sigma.npy"} <= {*archive.namelist()}:
            return None
        files = (io.BytesIO(archive.read(name)) for name in ("mu.npy", "sigma.npy"))
        return gaussian_from(*(np.load(file, allow_pickle=False) for file in files))


def measured_features(job: features.FeatureJob, extract: features.FeatureExtractor) -> dict[str, np.ndarray]:
    """Arrays (n, ...) by name of a part, from the file beside its images; written where that can be."""
    try:
        if look_at(job.folder, job.name).record is not None:
            return features.read_arrays(job.folder, job.name)
    except (FileNotFoundError, StoreError):
        pass  # no whole file from an earlier try
    arrays = features.joined([extract(images) for images in job.part.batches()])
    try:
        write_job(job.folder, job.name, features.pack(**arrays))
    except (OSError, StoreError) as error:
        logger.info("features of %s are not kept: %s", job.part.place.uri, error)
    return arrays


def image_set_of(model: Artifact) -> Artifact:
    """The set of images at the root of a stored model's inputs.
    Raises ValueError, in one line, for a model without one, or a set that isn't in the model's store."""
    stages, lacking, seen = Store(model.root.rsplit("/", 2)[0]), list[str](), set[str]()
    folders, before = stages.folders(), [model]
    while before:
        artifact = before.pop()
        if artifact.kind == "shards" and not artifact.inputs:
            return artifact
        for name, keys in sorted(artifact.inputs.items(), key=lambda each: each[0] == "images"):  # those last, so next
            for key in {*keys.split(",")} - seen:
                seen.add(key)
                there = (load_artifact(stages.join(folder, key)) for folder in dict.fromkeys((name, *folders)))
                found = next(filter(None, there), None)
                before += [found] if found else []
                lacking += [] if found else [f"{name}/{key}"]
    fault = f"; {', '.join(lacking)} is not in {shown(stages.uri)}" if lacking else ", its inputs name none"
    raise ValueError(f"{model.identity}: no set of images that it was trained on{fault}")


def requests_for(
    cascade: Cascade, captions: Sequence[str], own: ShardIndex | None, *, count: int, seed: int
) -> list[Request]:
    """Requests of the captions in turn, else of held-out images, or of the classes in turn.
    The images held out of `own` give classes, captions and condition images in their proportions. Raises ValueError, in
    one line, for a model that works on images."""
    bare, condition, shown_images = cascade.with_generator(Request()), cascade.condition_images, list[bytes]()
    asked = [bare.replace(prompt=caption) for caption in captions]
    if own is None or asked:
        labels = range(len(cascade.makers[str(bare.generator)].classes))
        asked = asked or [bare.replace(label=label) for label in labels] or [bare]
        return [asked[number % len(asked)].replace(seed=seed + number) for number in range(count)]
    words = joined_words([shard_words(own, "holdout", entry) for entry in own.shards])
    if condition is not None:
        view = View(condition.resolution, condition.member)
        shown_images = [encode_png(image) for image in read_split(own, "holdout", view, limit=count).image]
    drawn: dict[str, Any] = {"captions": words.caption, "images": shown_images, "count": count, "seed": seed}
    labels = words.label[: len(shown_images) or None]
    asked = measured_requests(cascade, str(bare.generator), labels=labels, **drawn)
    refuse(len(asked) < count, "the model works on images: give what it made of them as --images")
    return asked


def sample_into(folder: Path, cascade: Cascade, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
    """Samples images as PNG files named by number; yields images done and their total.
    Raises ValueError, in one line, for a folder that holds something or can't be made, or a model that takes no such
    request."""
    cascade.resolve_all(requests)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse(any(folder.iterdir()), f"{folder} holds files: name a new folder for the samples")
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; name a new folder for the samples") from None
    for start in range(0, len(requests), cascade.most_at_once):
        for number, image in enumerate(cascade.sample(requests[start : start + cascade.most_at_once]), start):
            (folder / f"{number:06d}.png").write_bytes(encode_png(image))
            yield number + 1, len(requests)


def evaluate_given(
    images: str,
    reference: str | Sequence[ShardImages],
    config: features.MeasureConfig,
    *,
    captions: Sequence[str] = (),
    clip: ClipScore | None = None,
    samples: Iterable[tuple[int, int]] = (),
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Every figure that the network has of the images against a reference, with N and the weights' sha256.
    `images`, `reference`: URIs as in the text of the module; the latter may be held-out images. `captions`: of the
    images in their order, for `clip`; of samples in turn. `samples`: makes the images, as `sample_into`, once reference
    and weights are read. `progress`: called with images done and their total. Raises ValueError, SourceError,
    ShardError or FeatureNetworkError, in one line."""
    lacking = clip is not None and not all(captions)
    refuse(lacking, "a CLIP score needs a caption for each image: give --captions FILE, a line for each")
    named, real, published = reference, list[ImagePart](), None
    if isinstance(reference, str):
        published = published_gaussian(reference) if config.feature_network == "inception" else None
        real += given_images(reference, needed=published is None)
    else:
        real, index = [*reference], reference[0].index
        named = f"{shown(index.source)}, held out in {shown(index.root)}"
    extract = features.extractor_of(config)
    facts = config.facts(extract.sha256)
    if published is not None:  # of no image: shapes alone
        size, own = extract(np.zeros((0, 64, 64, 3), np.uint8))[features.FEATURES].shape[1], len(published.mean)
        fault = f"{reference}: statistics of {own} features, {config.feature_network} has {size}"
        refuse(own != size, f"{fault}; give those of that network, or images")
    for so_far in samples:
        progress(*so_far)
    made, parts, done = given_images(images), [], 0
    count = sum(part.num_images for part in made)
    fault = clip is not None and not samples and len(captions) != count
    refuse(fault, f"{len(captions)} captions for {count} images: give each image a line, in the order of the names")
    for part in (*made, *real):
        parts.append(measured_features(features.feature_job(part, *facts), extract))
        progress(done := done + part.num_images, sum(each.num_images for each in (*made, *real)))
    arrays = features.joined(parts[: len(made)])
    references = features.joined(parts[len(made) :]).get(features.FEATURES, np.zeros((0, 1)))
    gaussian = gaussian_of(references) if published is None else published
    found, logits = arrays[features.FEATURES], arrays.get(features.LOGITS)
    compared = Compared(found, references, gaussian, seed=config.seed, logits=logits)
    row, scores, words = measured_row("images", "model", compared, tuple(METRICS)), [], cycle(captions)
    if clip is not None:
        for batch in (batch for part in made for batch in part.batches()):
            scores.append(clip(batch, [next(words) for _ in batch]))
    clip_score = {f"{clip.name}_{counted(count)}": float(np.concatenate(scores).mean())} if clip is not None else {}
    return {
        "images": images,
        "samples": row.samples,
        "reference": named,
        "reference_samples": len(references) or None,
        "published_statistics": published is not None,
        "feature_network": config.feature_network,
        "feature_weights": config.feature_weights,
        "sha256_of_weights": facts[2] if len(facts) > 2 else None,
        "seed": config.seed,
        "figures": row.published(config.feature_network) | clip_score,
        "standard_error_of_distance": row.standard_error,
        "sha256_of_clip_weights": None if clip is None else clip.sha256,
    }
