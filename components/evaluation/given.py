"""Figures of given images against a reference, both as users have them (`data/given.py`).

A reference may be published statistics: an npz file with `mu` and `sigma`, beside images or alone, as the reference
sets of ADM (Dhariwal & Nichol, 2021). Those stand for the distance of `inception`, the network and protocol that they
are of. Features are computed in this process, and kept in a folder `features` beside the images, where that can be
written. A trained model has a reference of its own: the held-out images of its set, which is found by the keys of
inputs that manifests name.

CLIP score of images and captions (Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image
Captioning"): 100 max(cos, 0) of the embeddings of an image and of its own caption, by a CLIPModel of transformers or of
open_clip (100 as the field's programs have it, 2.5 in the paper). A long caption loses its end. Images are prepared as
by CLIP's own program and open_clip, with and without torchvision.
Shapes: N images, H W their pixels, D features.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from components.configuration.config import refuse
from components.data.given import NUMPY, given_images, open_archive
from components.data.held_out import joined_words, read_split, shard_words
from components.data.shards import ShardIndex, View
from components.evaluation import features
from components.evaluation.generated import measured_requests
from components.evaluation.image_sets import ImagePart, ShardImages
from components.evaluation.metrics import METRICS, Compared, Gaussian, counted, gaussian_from, gaussian_of, measured_row
from components.runtime.pool import write_job
from components.runtime.storage.artifact import Artifact, load_artifact, look_at
from components.runtime.storage.connection import StoreError, reason, shown
from components.runtime.storage.store import Store, absolute
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from components.weights.features import of_transformers
from components.weights.files import read_tokenizer, read_weights
from components.weights.open_clip import MARK, STATED, as_clip_model

logger = logging.getLogger("cascade")
CLIP_WEIGHTS = (
    "a folder with tokenizer.json and CLIPModel's config.json and model.safetensors (openai/clip-vit-base-patch32), or "
    f"open_clip's {STATED} and open_clip_model.safetensors (laion/CLIP-ViT-B-32-laion2B-s34B-b79K)"
)
SCALING = {  # CLIP's own
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
SIZES = {768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}  # of a vision transformer, by its width
USUAL_SIDE = 224  # pixels


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
    clip: "ClipScore | None" = None,
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
    extract = features.FeatureExtractor(config)
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
    row = measured_row("images", "model", compared, tuple(METRICS))
    scores, words = [], cycle(captions)
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


class ClipScore:
    """Scores of pairs of an image and a caption, by one CLIPModel in fp32."""

    def __init__(self, uri: str) -> None:
        """Raises FeatureNetworkError of one line for a missing package, or weights that do not fit."""
        if find_spec("transformers") is None:
            raise features.FeatureNetworkError("clip_weights need transformers: pip install 'image-cascade[text]'")
        from transformers import logging

        logging.disable_progress_bar()  # a fault stays one line
        try:
            file, scaling = read_weights(uri), SCALING
            folder = uri.rstrip("/").removesuffix(file.uri.rpartition("/")[2]).rstrip("/") or "."
            if MARK in file.tensors:
                file, stated = as_clip_model(file, absolute(folder))
                scaling = SCALING | stated
            # Old files hold places of tokens and patches, which are no weights.
            weights = {name: tensor for name, tensor in file.tensors.items() if not name.endswith("position_ids")}
            model = of_transformers("CLIPModel", file._replace(tensors=weights))
            self.tokens = read_tokenizer(f"{folder}/tokenizer.json").bpe
        except (ValueError, OSError, RuntimeError, StoreError) as error:
            raise features.FeatureNetworkError(f"clip_weights {uri}: {reason(error)}; give {CLIP_WEIGHTS}") from error
        vision = model.config.vision_config
        self.side, self.sha256 = vision.image_size, file.sha256
        # Scores of two networks can't be compared: `clip_score_vit_l_14`, `clip_score_vit_l_14_336`.
        name = f"clip_score_vit_{SIZES.get(vision.hidden_size, vision.hidden_size)}_{vision.patch_size}"
        self.name = name + f"_{self.side}" * (self.side != USUAL_SIDE)
        self.mean, self.deviation = (np.array(scaling[name], np.float32) for name in ("mean", "std"))
        self.tokens.enable_truncation(model.config.text_config.max_position_embeddings)
        self.tokens.enable_padding()  # behind the end of a text, where no token sees it
        self.device = best_device()
        self.model = model.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """uint8 (N, H, W, 3) and N captions -> (N,) float64 in [0, 100]."""
        ids = torch.tensor([each.ids for each in self.tokens.encode_batch(list(captions))])
        scaled = (prepared(images, self.side) / np.float32(255) - self.mean) / self.deviation
        pixels = rearrange(torch.from_numpy(scaled), "n h w c -> n c h w").to(self.device)
        found = self.model(input_ids=ids.to(self.device), pixel_values=pixels)
        cosine = (found.image_embeds.double() * found.text_embeds.double()).sum(dim=1)  # of length 1 each
        return 100 * cosine.clamp(min=0).cpu().numpy()


def prepared(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> (N, side, side, 3): the shorter side resized, the center cut out.
    Bicubic by Pillow, and rounded as CLIP's own program does (Radford et al., 2021)."""
    height, width = images.shape[1:3]
    size = [side * each // min(height, width) for each in (width, height)]
    left, top = (round((each - side) / 2) for each in size)
    resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return np.stack(resized)[:, top : top + side, left : left + side]
