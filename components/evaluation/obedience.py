"""Obedience of images to captions of scenes: number, colors, shapes, size and sides asked for.

A judge reads each image (`scene_judge.py`). Pairs of a color and a shape that training never showed are counted apart.
Chance is what the same images reach under shuffled captions.
Shapes: N images, n of a part, A attributes.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.data.held_out import SMALL, SplitArrays
from components.evaluation.features import Measuring
from components.evaluation.generated import SampleJob, accepts, jobs_of, read_jobs
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import HELD_OUT, FileImages, branch_name, some_of, split_parts
from components.evaluation.metrics import share_error
from components.evaluation.scene_judge import SIDE, SceneJudge, Told, parse_caption, told_by
from components.evaluation.study import Findings, ModelStudy, StudyPlan
from components.runtime.pool import file_name
from components.sampling.cascade import Cascade
from components.sampling.requests import Request

SHUFFLES = 16  # orders of the captions that chance is the mean of
SHOWN, WIDEST = 12, 5  # captions, and images in a row: as wide as the longest caption
ATTRIBUTES = ("color", "shape", "color and shape", "number", "size", "side")
TITLE = "Obedience to captions: % of what was named that a judge sees, ± its standard error (by chance)"
GROUPS = ("seen", "unseen")  # pairs of a color and a shape
Key = tuple[str, str]  # attribute and group: of a pair that training showed, or never


class Obedience(NamedTuple):
    """The share of right points, by chance, and their number."""

    right: float
    chance: float
    count: int

    @property
    def words(self) -> str:
        """Percent, its standard error, and percent by chance."""
        return f"{100 * self.right:.1f} ± {100 * share_error(self.right, self.count):.1f} ({100 * self.chance:.0f})"


class ObedienceStudy(ModelStudy["ObedienceConfig"]):
    """Generators asked for held-out captions, with several seeds, and their images read by the judge.
    The inputs are `cascade` and `judge`. Half of the captions name a pair that training never showed, if there are
    such."""

    def plan(self) -> StudyPlan:
        """The jobs of each generator that takes captions, and held-out images under their own."""
        with self.models["cascade"].local_copy() as folder:
            models = Cascade.load(folder)
        held_out = self.held_out(resolution=SMALL, limit=self.index.samples)
        rows = chosen_rows(held_out, self.config.samples, self.index.held_out_pairs)
        captions = [held_out.caption[row] for row in rows]
        parts = some_of(split_parts(self.index, "holdout", resolution=SIDE), np.array(rows, np.int64))
        groups, sets = dict[str, list[SampleJob]](), dict[str, Any]({HELD_OUT: (parts, captions)})
        for generator in models.generators:
            wanted = [Request(generator=generator, prompt=caption) for caption in captions * self.config.seeds]
            first = self.config.seed * len(wanted)
            requests = [each.replace(seed=first + number) for number, each in enumerate(wanted)]
            if accepts(models, requests[0]):
                groups[generator] = jobs_of(f"{generator}_by_caption", requests)
                own = [FileImages(self.files, file_name(j.name), "image.", len(j.requests)) for j in groups[generator]]
                sets[branch_name(generator)] = (own, captions * self.config.seeds)
        return StudyPlan(groups, facts=sets)

    def measure(self, plan: StudyPlan, work: Measuring) -> dict[str, np.ndarray]:
        """Choices that the judge reads in the images of each set, int64 (N, A)."""
        parts = [part for own, _ in plan.facts.values() for part in own]
        read = work.pool.map(partial(SceneJudge, self.models["judge"]), parts)
        return {name: np.concatenate([next(read) for _ in own]) for name, (own, _) in plan.facts.items()}

    def findings(self, plan: StudyPlan, measured: Mapping[str, np.ndarray]) -> Findings:
        """A table of attributes for seen and unseen pairs, beside chance; images with the captions asked for."""
        rows, summary, headline = list[list[str]](), dict[str, float](), dict[str, float]()
        for name, read in measured.items():
            shares = shares_of(plan.facts[name][1], read, self.index.held_out_pairs, seed=self.config.seed)
            for group in dict.fromkeys(group for _, group in shares):
                cells = (shares[of, group].words if (of, group) in shares else "–" for of in ATTRIBUTES)
                rows.append([f"{name}, {group} pairs", *cells])
            for (attribute, group), share in shares.items():
                of = f"{name}, {attribute}" if len(plan.groups) > 1 else attribute
                metric = f"obedience_{name}_{group}_{attribute}".replace(" ", "_").replace("-", "_")
                summary |= {metric: share.right, f"{metric}_chance": share.chance}
                if name != HELD_OUT:
                    headline[f"{of}, {group} pairs, % (N {share.count})"] = 100 * share.right
        shown = {f"{name}_by_caption": drawn(jobs, self) for name, jobs in plan.groups.items()}
        return Findings({}, {TITLE: {"columns": ["images", *ATTRIBUTES], "rows": rows}}, summary, headline, shown)


class ObedienceConfig(Config):
    """Numbers of captions and of seeds for each."""

    study: ClassVar[type] = ObedienceStudy

    samples: int = Field(256, ge=2)  # held-out captions
    seeds: int = Field(3, ge=1)  # images of each caption
    seed: int = Field(0, ge=0)


def chosen_rows(held_out: SplitArrays, samples: int, unseen: Sequence[str]) -> list[int]:
    """Numbers of held-out scenes, ascending: at most half of `samples` with an unseen pair.
    Raises ValueError for captions that are none of scenes."""
    told = [parse_caption(caption) for caption in held_out.caption]
    if None in told:
        other = held_out.caption[told.index(None)]
        raise ValueError(f"obedience: {other!r} is no caption of a scene; leave obedience out for other images")
    strange = [row for row, each in enumerate(told) if each and set(each.pairs) & set(unseen)][: samples // 2]
    usual = [row for row, each in enumerate(told) if each and not set(each.pairs) & set(unseen)]
    return sorted(strange + usual[: samples - len(strange)])


def shares_of(captions: Sequence[str], read: np.ndarray, unseen: Sequence[str], *, seed: int) -> dict[Key, Obedience]:
    """Shares of right points by attribute and group, of images read as (N, A) and their N captions."""
    told, seen = [parse_caption(caption) for caption in captions], [told_by(row) for row in read.tolist()]
    asked, generator = [each for each in told if each is not None], np.random.default_rng(seed)
    orders = [range(len(asked)), *(generator.permutation(len(asked)) for _ in range(SHUFFLES))]
    counted = [count_points([asked[n] for n in order], seen, unseen) for order in orders]
    shares = {}
    for key in ((attribute, group) for group in GROUPS for attribute in ATTRIBUTES):
        (right, count), by_chance = counted[0].get(key, (0, 0)), [each.get(key, (0, 0)) for each in counted[1:]]
        if count:
            chance = sum(hits for hits, _ in by_chance) / max(1, sum(number for _, number in by_chance))
            shares[key] = Obedience(right / count, chance, count)
    return shares


def count_points(asked: Sequence[Told], seen: Sequence[Told], unseen: Sequence[str]) -> dict[Key, tuple[int, int]]:
    """Right points and all points by attribute and group."""
    counts: dict[Key, tuple[int, int]] = {}
    for told, shown in zip(asked, seen, strict=True):
        for key, correct in compare(told, shown, unseen):
            right, count = counts.get(key, (0, 0))
            counts[key] = right + correct, count + 1
    return counts


def compare(told: Told, seen: Told, unseen: Sequence[str]) -> Iterator[tuple[Key, bool]]:
    """The points of an image: attributes that the caption names, and whether the image shows them.
    `seen` has the solids from left to right. Each named solid counts by itself, in the order of sides that agrees
    best, so that a wrong side is no wrong color. A side counts where the two named solids differ: they must agree
    better so than with sides exchanged."""
    named = told.pairs[::-1] if told.side == "right" else told.pairs
    forward, exchanged = agreement(named, seen.pairs), agreement(named, seen.pairs[::-1])
    shown = seen.pairs if forward >= exchanged else seen.pairs[::-1]
    for number, pair in enumerate(named):
        other = shown[number] if number < len(shown) else " "
        right = [one == two for one, two in zip(pair.split(), other.split(" "), strict=True)]
        for attribute, correct in zip(ATTRIBUTES, (*right, all(right)), strict=False):
            yield (attribute, GROUPS[pair in unseen]), correct
    group = GROUPS[any(pair in unseen for pair in named)]
    yield ("number", group), len(named) == len(seen.pairs)
    if told.size is not None:
        yield ("size", group), told.size == seen.size
    if len(set(named)) > 1:
        yield ("side", group), len(seen.pairs) > 1 and forward > exchanged


def agreement(named: Sequence[str], shown: Sequence[str]) -> int:
    """Number of equal words at equal places."""
    pairs = zip(named, shown, strict=False)
    return sum(one == two for own, other in pairs for one, two in zip(own.split(), other.split(), strict=True))


def drawn(jobs: Sequence[SampleJob], study: ObedienceStudy) -> bytes:
    """Grid of images of a generator's first captions, a row for each."""
    captions = [str(request.prompt) for job in jobs for request in job.requests]
    samples, images = len(captions) // study.config.seeds, read_jobs(jobs, study.files).finished
    rows = [GridBlock("", list(images[row::samples]), words=captions[row]) for row in range(min(SHOWN, samples))]
    return render_blocks(rows, columns=max(WIDEST, study.config.seeds))
