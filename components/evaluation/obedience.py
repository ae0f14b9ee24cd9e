"""Obedience of images to captions of scenes: number, colors, shapes, size and sides asked for.

A small network, trained on renderings, reads what each image shows. No system sees the scenes that it learns from:
their numbers begin where those of sets end. It learns every pair of a color and a shape, also those that sets hold out.
Pairs that training never showed are counted apart. Chance is what the same images reach under shuffled captions.
Shapes: N images of SIDE² pixels, n of a part, A attributes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from components.configuration.config import Config, refuse
from components.data.held_out import SMALL, SplitArrays
from components.data.sources.scenes import COLORS, LARGE, OWN_NUMBERS, SHAPES, Solid, render, scene
from components.evaluation.features import Measuring
from components.evaluation.generated import SampleJob, accepts, jobs_of, load_cascade, read_jobs
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import HELD_OUT, ImagePart, branch_name, shrink, some_of, split_parts
from components.evaluation.metrics import share_error
from components.evaluation.study import AskedSet, Findings, ModelStudy, StudyPlan, judged
from components.runtime.storage.artifact import Artifact
from components.sampling.images import from_uint8
from components.sampling.requests import Request

SHUFFLES = 16  # orders of the captions that chance is the mean of
SHOWN, WIDEST = 12, 5  # captions, and images in a row: as wide as the longest caption
ATTRIBUTES = ("color", "shape", "color and shape", "number", "size", "side")
TITLE = "Obedience to captions: % of what was named that a judge sees, ± its standard error (by chance)"
GROUPS = ("seen", "unseen")  # pairs of a color and a shape
Key = tuple[str, str]  # attribute and group: of a pair that training showed, or never
SIDE = 32  # pixels; larger images are averaged
WEIGHTS = "judge.safetensors"
NO_ANSWER = -100  # size of a pair, words of a second solid that is not there
CHOICES: dict[str, Sequence[str]] = {  # attribute -> what it may be; solids from left to right
    **{"number": ("one", "two"), "size": ("small", "large"), "color": tuple(COLORS), "shape": SHAPES},
    **{"color of the right one": tuple(COLORS), "shape of the right one": SHAPES},
}
BATCH_SIZE, RATE = 64, 2e-3
NOISE, SHIFT = 0.1, 1  # of images in training: standard deviation, pixels
ONE = f"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
SINGLE = re.compile(f"a (?P<size>small|large) (?P<pair>{ONE})")
PAIR = re.compile(f"an? (?P<pair>{ONE}) to the (?P<side>left|right) of an? (?P<other>{ONE})")


class Told(NamedTuple):
    """Facts that a caption tells of a scene."""

    pairs: tuple[str, ...]  # color and shape of each solid, in the caption's order
    size: str | None = None  # of a single solid: small or large
    side: str | None = None  # of the first of two solids: left or right


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
        models = load_cascade(self.models["cascade"])
        config = self.config
        held_out = self.held_out(resolution=SMALL, limit=self.index.samples)
        rows = chosen_rows(held_out, config.samples, self.index.held_out_pairs)
        captions = [held_out.caption[row] for row in rows]
        parts = some_of(split_parts(self.index, "holdout", resolution=SIDE), np.array(rows, np.int64))
        groups, sets = dict[str, list[SampleJob]](), {HELD_OUT: AskedSet(parts, captions)}
        asked = captions * config.seeds
        for generator in models.generators:
            seeds = range(config.seed * len(asked), (config.seed + 1) * len(asked))
            pairs = zip(asked, seeds, strict=True)
            requests = [Request(generator=generator, prompt=caption, seed=seed) for caption, seed in pairs]
            if accepts(models, requests[0]):
                groups[generator] = jobs_of(f"{generator}_by_caption", requests)
                sets[branch_name(generator)] = AskedSet(self.images(groups[generator]), asked)
        return StudyPlan(groups, facts=sets)

    def measure(self, plan: StudyPlan, work: Measuring) -> dict[str, np.ndarray]:
        """Choices that the judge reads in the images of each set, int64 (N, A)."""
        return judged(work.pool, partial(SceneJudge, self.models["judge"]), plan.facts)

    def findings(self, plan: StudyPlan, measured: Mapping[str, np.ndarray]) -> Findings:
        """A table of attributes for seen and unseen pairs, beside chance; images with the captions asked for."""
        rows, summary, headline = list[list[str]](), dict[str, float](), dict[str, float]()
        for name, read in measured.items():
            shares = shares_of(plan.facts[name].asked, read, self.index.held_out_pairs, seed=self.config.seed)
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
    asked = [told for caption in captions if (told := parse_caption(caption)) is not None]
    seen = [told_by(row) for row in read.tolist()]
    generator = np.random.default_rng(seed)
    orders = [range(len(asked)), *(generator.permutation(len(asked)) for _ in range(SHUFFLES))]
    own = Counter[tuple[Key, bool]]()
    shuffled = Counter[tuple[Key, bool]]()
    for number, order in enumerate(orders):
        for told, image in zip((asked[n] for n in order), seen, strict=True):
            (shuffled if number else own).update(compare(told, image, unseen))
    shares = {}
    for key in ((attribute, group) for group in GROUPS for attribute in ATTRIBUTES):
        if count := own[key, True] + own[key, False]:
            chance = shuffled[key, True] / max(1, shuffled[key, True] + shuffled[key, False])
            shares[key] = Obedience(own[key, True] / count, chance, count)
    return shares


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


class SceneJudgeConfig(Config):
    """Training of the judge of scenes, and the accuracy below which it judges nothing."""

    renderings: int = Field(6000, ge=64)
    steps: int = Field(700, ge=1)
    held_out: int = Field(1000, ge=1)  # renderings that its accuracy is measured on
    least_accuracy: float = Field(0.99, ge=0, le=1)  # of every attribute
    seed: int = Field(0, ge=0)


def judge_network() -> nn.Sequential:
    """Three convolutions and two layers: images in [-1, 1] to logits (N, sum of the choices)."""
    layers: list[nn.Module] = []
    for channels, wider in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
    choices = sum(map(len, CHOICES.values()))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(96 * (SIDE // 8) ** 2, 192), nn.ReLU(), nn.Linear(192, choices)
    )


def train_judge(config: SceneJudgeConfig) -> tuple[bytes, dict[str, float]]:
    """Trains a judge on renderings and measures it on others. Runs in a worker.
    Returns the weights, as safetensors, and the accuracy of each attribute on held-out renderings, in [0, 1]. Raises
    ValueError, before any training, where these do not show every attribute."""
    shown, truth = renderings(OWN_NUMBERS + config.renderings, config.held_out)
    known = truth != NO_ANSWER
    unread = ", ".join(name for name, some in zip(CHOICES, known.any(axis=0), strict=True) if not some)
    refuse(unread, f"judge.held_out={config.held_out}: these renderings do not show {unread}; raise it")
    images, answers = renderings(OWN_NUMBERS, config.renderings)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = judge_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        batch = torch.roll(from_uint8(images[rows.numpy()]), shift, dims=(2, 3))
        batch = batch + NOISE * torch.rand((), generator=generator) * torch.randn(batch.shape, generator=generator)
        answered = torch.from_numpy(answers[rows.numpy()])
        pairs = zip(logits_of(network(batch)), answered.T, strict=True)
        losses = [nn.functional.cross_entropy(own, right, ignore_index=NO_ANSWER) for own, right in pairs]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    seen = read_attributes(network.eval(), shown)
    right = {name: float((seen == truth)[known[:, n], n].mean()) for n, name in enumerate(CHOICES)}
    return save(network.state_dict()), right


def renderings(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of consecutive numbers: images uint8 (N, SIDE, SIDE, 3), and right answers int64 (N, A)."""
    scenes = [scene(number) for number in range(first, first + count)]
    images = np.stack([render(solids, resolution=SIDE)[0] for solids in scenes])
    return images, np.array([right_answers(solids) for solids in scenes])


def right_answers(solids: Sequence[Solid]) -> list[int]:
    """Places among CHOICES of the true answers of a scene, NO_ANSWER where there is none."""
    ordered = sorted(solids, key=lambda solid: solid.x)
    size = int(ordered[0].size >= LARGE) if len(solids) == 1 else NO_ANSWER
    words = [place for solid in ordered for place in ([*COLORS].index(solid.color), SHAPES.index(solid.shape))]
    return [len(solids) - 1, size, *words, *[NO_ANSWER] * (4 - len(words))]


def logits_of(output: Tensor) -> tuple[Tensor, ...]:
    """Splits the network's output into the logits (N, choices) of each attribute."""
    return output.split([len(choices) for choices in CHOICES.values()], dim=1)


@torch.no_grad()
def read_attributes(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Most likely choices of images uint8 (N, SIDE, SIDE, 3), int64 (N, A)."""
    made = [network(from_uint8(part)) for part in np.array_split(images, -(-len(images) // 256))]
    return np.stack([own.argmax(1).numpy() for own in logits_of(torch.cat(made))], axis=1)


def parse_caption(text: str) -> Told | None:
    """The facts of a scene's caption; None for any other text."""
    found = SINGLE.fullmatch(text)
    if found:
        return Told((found["pair"],), size=found["size"])
    found = PAIR.fullmatch(text)
    return Told((found["pair"], found["other"]), side=found["side"]) if found else None


def told_by(answers: Sequence[int]) -> Told:
    """The facts of what a judge has read, solids from left to right."""
    number, size, *words = (choices[place] for choices, place in zip(CHOICES.values(), answers, strict=True))
    pairs = tuple(f"{words[place]} {words[place + 1]}" for place in ((0, 2) if number == "two" else (0,)))
    return Told(pairs, size=size if number == "one" else None)


class SceneJudge:
    """Pool worker that reads the images of a part: int64 (n, A)."""

    def __init__(self, judge: Artifact) -> None:
        self.network = judge_network()
        self.network.load_state_dict(load(judge.read(WEIGHTS)))
        self.network.eval()

    def __call__(self, part: ImagePart) -> np.ndarray:
        batches = (each if each.shape[1] == SIDE else shrink(each, SIDE) for each in part.batches())
        return np.concatenate([read_attributes(self.network, images) for images in batches])
