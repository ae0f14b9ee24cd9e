"""Agreement of generated images with the requested class or caption, judged by independent models.

Each image is asked for by a label alone or by a caption alone. An independent classifier judges the class of an image.
A contrastive encoder (Radford et al., 2021) ranks the caption of an image among other captions. Neither network had a
part in making the images. Chance is what images reach whose labels or captions were shuffled.
Shapes: N images, n of a part, K classes, C captions, E embedding_dim.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field

from components.configuration.config import Config
from components.data.held_out import SMALL, read_split
from components.data.shards import ShardIndex, Split, View
from components.evaluation.features import Measuring
from components.evaluation.generated import SampleJob, accepts, jobs_of
from components.evaluation.image_sets import KNOWN, FileImages, ImagePart, branch_name, held_out_parts, shrink, some_of
from components.evaluation.metrics import share_error
from components.evaluation.sampling_studies import judge
from components.evaluation.study import Findings, ModelStudy, StudyPlan, load_trained
from components.models.contrastive import ContrastiveEncoder
from components.runtime.pool import file_name
from components.runtime.storage.artifact import Artifact
from components.sampling.cascade import Cascade
from components.sampling.images import from_uint8
from components.sampling.model import describe_model
from components.sampling.requests import Request

EQUAL = 6  # decimals: smaller differences of cosines depend on the order of computation
AskedBy = Literal["label", "prompt"]
JUDGES: dict[str, AskedBy] = {"judge": "label", "matcher": "prompt"}  # name of the input -> what it judges
TITLES: dict[AskedBy, str] = {  # of the tables
    "label": "Asked for by label: the class that an independent classifier sees",
    "prompt": "Asked for by prompt: the own caption among others, by a contrastive encoder",
}
FIRST: dict[AskedBy, str] = {"label": "class seen", "prompt": "own caption first"}
COLUMNS: dict[AskedBy, str] = {
    "label": "images, accuracy, its standard error, chance, N",
    "prompt": "images, own caption first, its standard error, chance, median rank, chance of it, captions, N",
}


class Wanted(NamedTuple):
    """A label alone or a caption alone of an image of the set, as a request."""

    row: int  # number among the images of the split
    asked: int  # class id, or number of the caption
    request: Request


class AskedPart(NamedTuple):
    """Images for one worker to judge, with the requested class id or caption number of each image."""

    images: ImagePart
    asked: tuple[int, ...]  # (n,)


class Agreement(NamedTuple):
    """Agreement of a set of images with the requests, with the chance level and the number of candidates."""

    count: int  # N
    accuracy: float  # share of images whose own class, or caption, comes first
    chance: float  # of the accuracy
    median_rank: float = 1.0  # of the own caption, from 1
    candidates: int = 1  # C


Found = Mapping[AskedBy, Mapping[str, Agreement]]  # by name of the set


class AgreementStudy(ModelStudy["AgreementConfig"]):
    """Each generator asked for labels alone and for captions alone, and the images judged.
    Labels and captions are those of held-out images, of training images in a set that holds nothing out. The inputs
    are `cascade`, `judge`, a classifier of clean images, and `matcher`, a contrastive encoder; without one of these no
    image is asked for by label, or by prompt."""

    @property
    def judges(self) -> dict[AskedBy, Artifact]:
        """The independent models by what they judge."""
        return {by: self.models[name] for name, by in JUDGES.items() if name in self.models}

    def plan(self) -> StudyPlan:
        """Jobs of each generator, and the images of the set under their own labels and captions."""
        with self.models["cascade"].local_copy() as folder:
            models = Cascade.load(folder)
        wanted, groups, sets = wanted_of(self.index, self.config.samples), {}, dict[AskedBy, Any]()
        captions = tuple(str(each.request.prompt) for each in wanted["prompt"])  # all different
        for by, model in self.judges.items():
            sets[by] = {}
            for generator in models.generators:
                jobs = asked_jobs(models, generator, by, wanted[by], seed=self.config.seed)
                groups[f"{generator} {by}"], parts = jobs, []
                for job in jobs:
                    images = FileImages(self.files, file_name(job.name), "image.", len(job.requests))
                    asked = (captions.index(r.prompt) if r.prompt else int(r.label or 0) for r in job.requests)
                    parts.append(AskedPart(images, tuple(asked)))
                sets[by] |= {branch_name(generator): parts} if parts else {}
            with model.local_copy() as folder:
                side = describe_model(by, folder).settings["resolution"]
            if parts := known_parts(self.index, wanted[by], resolution=side):
                sets[by][KNOWN[known_split(self.index)]] = parts
        return StudyPlan(groups, facts=(captions, sets))

    def measure(self, plan: StudyPlan, work: Measuring) -> Found:
        """Agreement of each generator's images, and of the images of the set."""
        found, (captions, sets) = dict[AskedBy, dict[str, Agreement]](), plan.facts
        for by, model in self.judges.items():
            parts = [part for group in sets[by].values() for part in group]
            worker = partial(Judge, model, captions if by == "prompt" else ())
            values, found[by] = work.pool.map(worker, parts), {}
            for name, group in sets[by].items():
                seen, asked = np.concatenate([next(values) for _ in group]), [part.asked for part in group]
                of_captions = by == "prompt" and caption_agreement(seen, len(captions))
                found[by][name] = of_captions or class_agreement(seen, np.concatenate(asked))
        return found

    def findings(self, plan: StudyPlan, measured: Found) -> Findings:
        """A table for labels and one for prompts beside chance; the headline is shares of right images."""
        tables, summary, headline = {}, {}, {}
        for by, sets in measured.items():
            rows = []
            for name, each in sets.items():
                end = f"{by}_{name.replace(' ', '_').replace('-', '_')}"
                summary |= {f"accuracy_{end}": each.accuracy, f"chance_{end}": each.chance}
                summary |= {f"median_rank_{end}": each.median_rank} if by == "prompt" else {}
                headline[f"{FIRST[by]}, {name} (N {each.count})"] = each.accuracy
                ranks = [each.median_rank, (each.candidates + 1) / 2, each.candidates] if by == "prompt" else []
                error = share_error(each.accuracy, each.count)
                rows.append([name, each.accuracy, error, each.chance, *ranks, each.count])
            if rows:
                tables[TITLES[by]] = {"columns": COLUMNS[by].split(", "), "rows": rows}
        return Findings({}, tables, summary, headline, {})


class AgreementConfig(Config):
    """Number of images to judge, and the seed of the sampled images."""

    study: ClassVar[type] = AgreementStudy

    samples: int = Field(128, ge=2)  # of each generator by label, and by prompt; and held-out images
    seed: int = Field(0, ge=0)


def known_split(index: ShardIndex) -> Split:
    """The split for conditions: held-out images where there are any, as in `held_out_parts`."""
    return "holdout" if index.samples > index.train_samples else "train"


def wanted_of(index: ShardIndex, samples: int) -> dict[AskedBy, list[Wanted]]:
    """Labels of the first images of the split, and captions of the first images, each caption once."""
    known = read_split(index, known_split(index), View(SMALL), limit=4 * samples)
    labels = [Wanted(row, label, Request(label=label)) for row, label in enumerate(known.label.tolist())]
    first = {caption: known.caption.index(caption) for caption in dict.fromkeys(known.caption) if caption}
    prompts = [Wanted(row, n, Request(prompt=caption)) for n, (caption, row) in enumerate(first.items())]
    return {"label": labels[:samples], "prompt": prompts[:samples]}


def asked_jobs(models: Cascade, generator: str, by: AskedBy, wanted: Sequence[Wanted], *, seed: int) -> list[SampleJob]:
    """Jobs of a generator for the labels or captions that it takes alone."""
    requests = []
    for number, each in enumerate(wanted):
        request = each.request.replace(seed=seed + number, generator=generator)
        requests += [request] if accepts(models, request) else []
    return jobs_of(f"{generator}_by_{by}", requests)


def known_parts(index: ShardIndex, wanted: Sequence[Wanted], *, resolution: int) -> list[AskedPart]:
    """Images of the set in parts, each image with the true label or caption."""
    rows, asked = np.array([each.row for each in wanted], dtype=np.int64), iter([each.asked for each in wanted])
    known = held_out_parts(index, resolution=resolution, limit=int(rows.max(initial=-1)) + 1)
    parts = some_of(known, rows)
    return [AskedPart(part, tuple(next(asked) for _ in range(part.num_images))) for part in parts]


class Judge:
    """Pool worker that judges the images of a part.
    A classifier of clean images returns the classes (n,) int64 that it sees, a contrastive encoder the rank (n,) of
    each image's own caption among C captions."""

    def __init__(self, model: Artifact, captions: Sequence[str] = ()) -> None:
        self.model, self.text = load_trained(model), None
        self.encoder = cast("ContrastiveEncoder", self.model.module)  # where there are captions
        if captions:
            assert self.model.text is not None
            texts = self.model.text.encode(captions).to(self.model.device)
            with torch.no_grad():
                self.text = self.encoder.encode_text(texts).embedding.cpu().numpy()  # (C, E) of length 1

    @torch.no_grad()
    def __call__(self, part: AskedPart) -> np.ndarray:
        side = self.model.settings["resolution"]
        batches = [each if each.shape[1] == side else shrink(each, side) for each in part.images.batches()]
        if self.text is None:
            return np.concatenate([judge(self.model, images) for images in batches])
        images = (from_uint8(each).to(self.model.device) for each in batches)
        embeddings = [self.encoder.encode_image(image).cpu().numpy() for image in images]
        return caption_ranks(np.concatenate(embeddings), self.text, np.array(part.asked))


def caption_ranks(image: np.ndarray, text: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank of each image's own caption by cosine among all, from 1; an equal cosine counts as half.
    Of images (N, E) and captions (C, E), each of length 1, and the numbers (N,) of the images' captions. Returns (N,)
    float64 in [1, C], whose mean over all captions as the own one is (C + 1) / 2."""
    cosine = (image.astype(np.float64) @ text.astype(np.float64).T).round(EQUAL)  # (N, C)
    right = cosine[np.arange(len(image)), own][:, None]  # (N, 1)
    nearer, equal = (cosine > right).sum(axis=1), (cosine == right).sum(axis=1) - 1
    return 1 + nearer + equal / 2


def caption_agreement(ranks: np.ndarray, candidates: int) -> Agreement:
    """Agreement of ranks (N,) among `candidates` captions."""
    first = float((ranks == 1).mean())
    return Agreement(len(ranks), first, 1 / candidates, float(np.median(ranks)), candidates)


def class_agreement(seen: np.ndarray, asked: np.ndarray) -> Agreement:
    """Agreement of recognized classes (N,) with requested classes (N,).
    The chance is the mean over all orders of `asked`: more than 1 / K where some classes are frequent in both
    arrays."""
    num_classes = 1 + max(seen.max(), asked.max())
    counts = [np.bincount(classes, minlength=num_classes) for classes in (seen, asked)]  # (K,) each
    chance = (counts[0] / len(seen)) @ (counts[1] / len(asked))
    return Agreement(len(seen), float((seen == asked).mean()), float(chance))
