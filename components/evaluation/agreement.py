"""Agreement of generated images with the requested class or caption, judged by independent models.

Each image is asked for by a label alone or by a caption alone. An independent classifier judges the class of an image.
A contrastive encoder (Radford et al., 2021) ranks the caption of an image among other captions. Neither network had a
part in making the images. Chance is what images reach whose labels or captions were shuffled.
Shapes: N images, n of a part, K classes, C captions, E embedding_dim.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field

from components.configuration.config import Config
from components.data.held_out import SMALL, read_split
from components.data.shards import ShardIndex, Split, View
from components.evaluation.features import Measuring
from components.evaluation.generated import accepts, jobs_of, load_cascade
from components.evaluation.image_sets import KNOWN, ImagePart, ShardImages, branch_name, held_out_parts, shrink, some_of
from components.evaluation.metrics import share_error
from components.evaluation.sampling_studies import judge
from components.evaluation.study import AskedSet, Findings, ModelStudy, StudyPlan, judged, load_trained
from components.models.contrastive import ContrastiveEncoder
from components.runtime.storage.artifact import Artifact
from components.sampling.images import from_uint8
from components.sampling.model import describe_model
from components.sampling.requests import Request

EQUAL = 6  # decimals: smaller differences of cosines depend on the order of computation
AskedBy = Literal["label", "prompt"]


class Way(NamedTuple):
    """Words of a way to ask for images: input of its judge, title of a table, names of the accuracy."""

    judge: str
    title: str
    column: str
    headline: str


BY_LABEL = "Asked for by label: the class that an independent classifier sees"
BY_PROMPT = "Asked for by prompt: the own caption among others, by a contrastive encoder"
WAYS: dict[AskedBy, Way] = {
    "label": Way("judge", BY_LABEL, "accuracy", "class seen"),
    "prompt": Way("matcher", BY_PROMPT, "own caption first", "own caption first"),
}


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
        return {by: self.models[way.judge] for by, way in WAYS.items() if way.judge in self.models}

    def plan(self) -> StudyPlan:
        """Jobs of each generator, and the images of the set under their own labels and captions."""
        models = load_cascade(self.models["cascade"])
        wanted = wanted_of(self.index, self.config.samples)
        captions = tuple(str(request.prompt) for request in wanted["prompt"].values())  # all different
        groups = {}
        sets = dict[AskedBy, dict[str, AskedSet]]()
        for by, model in self.judges.items():
            with model.local_copy() as folder:
                side = describe_model(by, folder).settings["resolution"]
            answers, own = {}, list(wanted[by].values())
            for generator in models.generators:
                seeds = range(self.config.seed, self.config.seed + len(own))
                requests = [each.replace(seed=n, generator=generator) for each, n in zip(own, seeds, strict=True)]
                taken = [request for request in requests if accepts(models, request)]
                groups[f"{generator} {by}"] = jobs = jobs_of(f"{generator}_by_{by}", taken)
                answers |= {branch_name(generator): (self.images(jobs), taken)} if taken else {}
            if known := known_parts(self.index, [*wanted[by]], resolution=side):
                answers[KNOWN[known[0].split]] = known, own
            sets[by] = {
                name: AskedSet(parts, [captions.index(r.prompt) if r.prompt else r.label for r in requests])
                for name, (parts, requests) in answers.items()
            }
        return StudyPlan(groups, facts=(captions, sets))

    def measure(self, plan: StudyPlan, work: Measuring) -> Found:
        """Agreement of each generator's images, and of the images of the set."""
        found, (captions, sets) = dict[AskedBy, dict[str, Agreement]](), plan.facts
        for by, model in self.judges.items():
            seen = judged(work.pool, partial(Judge, model, captions if by == "prompt" else ()), sets[by])
            agreement = caption_agreement if by == "prompt" else class_agreement
            found[by] = {name: agreement(seen[name], np.array(images.asked)) for name, images in sets[by].items()}
        return found

    def findings(self, plan: StudyPlan, measured: Found) -> Findings:
        """A table for labels and one for prompts beside chance; the headline is shares of right images."""
        tables, summary, headline = {}, {}, {}
        for by, sets in measured.items():
            ranked = by == "prompt"
            ranks = ["median rank", "chance of it", "captions"] if ranked else []
            columns = ["images", WAYS[by].column, "its standard error", "chance", *ranks, "N"]
            rows = []
            for name, each in sets.items():
                end = f"{by}_{name.replace(' ', '_').replace('-', '_')}"
                summary |= {f"accuracy_{end}": each.accuracy, f"chance_{end}": each.chance}
                summary |= {f"median_rank_{end}": each.median_rank} if ranked else {}
                headline[f"{WAYS[by].headline}, {name} (N {each.count})"] = each.accuracy
                ranks = [each.median_rank, (each.candidates + 1) / 2, each.candidates] if ranked else []
                error = share_error(each.accuracy, each.count)
                rows.append([name, each.accuracy, error, each.chance, *ranks, each.count])
            if rows:
                tables[WAYS[by].title] = {"columns": columns, "rows": rows}
        return Findings({}, tables, summary, headline, {})


class AgreementConfig(Config):
    """Number of images to judge, and the seed of the sampled images."""

    study: ClassVar[type] = AgreementStudy

    samples: int = Field(128, ge=2)  # of each generator by label, and by prompt; and held-out images
    seed: int = Field(0, ge=0)


def wanted_of(index: ShardIndex, samples: int) -> dict[AskedBy, dict[int, Request]]:
    """Requests by the number of an image of the split: labels, and captions, each of these once."""
    split: Split = "holdout" if index.samples > index.train_samples else "train"  # as in `held_out_parts`
    known = read_split(index, split, View(SMALL), limit=4 * samples)
    captions = (caption for caption in dict.fromkeys(known.caption) if caption)
    wanted: dict[AskedBy, dict[int, Request]] = {
        "label": {row: Request(label=label) for row, label in enumerate(known.label.tolist())},
        "prompt": {known.caption.index(caption): Request(prompt=caption) for caption in captions},
    }
    return {by: dict(islice(requests.items(), samples)) for by, requests in wanted.items()}


def known_parts(index: ShardIndex, numbers: Sequence[int], *, resolution: int) -> list[ShardImages]:
    """The images of the set with the given ascending numbers."""
    rows = np.array(numbers, dtype=np.int64)
    return some_of(held_out_parts(index, resolution=resolution, limit=int(rows.max(initial=-1)) + 1), rows)


class Judge:
    """Pool worker that judges the images of a part.
    A classifier of clean images returns the classes (n,) int64 that it sees, a contrastive encoder the cosine (n, C) of
    each image and each of the captions."""

    def __init__(self, model: Artifact, captions: Sequence[str] = ()) -> None:
        self.model, self.text = load_trained(model), None
        self.encoder = cast("ContrastiveEncoder", self.model.module)  # where there are captions
        if captions:
            assert self.model.text is not None
            texts = self.model.text.encode(captions).to(self.model.device)
            with torch.no_grad():
                self.text = self.encoder.encode_text(texts).embedding.cpu().numpy()  # (C, E) of length 1

    @torch.no_grad()
    def __call__(self, part: ImagePart) -> np.ndarray:
        side = self.model.settings["resolution"]
        batches = [each if each.shape[1] == side else shrink(each, side) for each in part.batches()]
        if self.text is None:
            return np.concatenate([judge(self.model, images) for images in batches])
        images = (from_uint8(each).to(self.model.device) for each in batches)
        return cosines(np.concatenate([self.encoder.encode_image(image).cpu().numpy() for image in images]), self.text)


def cosines(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Cosines (N, C) of images (N, E) and captions (C, E), each of length 1, in float64."""
    return (image.astype(np.float64) @ text.astype(np.float64).T).round(EQUAL)


def caption_ranks(cosine: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank of each image's own caption by cosine (N, C) among all, from 1; an equal cosine counts as half.
    `own`: the numbers (N,) of the images' captions. Returns (N,) float64 in [1, C], whose mean over all captions as the
    own one is (C + 1) / 2."""
    right = cosine[np.arange(len(cosine)), own][:, None]  # (N, 1)
    nearer, equal = (cosine > right).sum(axis=1), (cosine == right).sum(axis=1) - 1
    return 1 + nearer + equal / 2


def caption_agreement(cosine: np.ndarray, own: np.ndarray) -> Agreement:
    """Agreement by the ranks of the own captions, see `caption_ranks`."""
    ranks, candidates = caption_ranks(cosine, own), cosine.shape[1]
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
