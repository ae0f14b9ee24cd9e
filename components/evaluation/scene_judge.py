"""A judge of scenes: a small network, trained on renderings, that reads what an image shows.

No system sees the scenes that it learns from: their numbers begin where those of sets end. It learns every pair of a
color and a shape, also those that sets hold out.
Shapes: N images of SIDE² pixels, A attributes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from components.configuration.config import Config, refuse
from components.data.sources.scenes import COLORS, LARGE, OWN_NUMBERS, SHAPES, Solid, render, scene
from components.evaluation.image_sets import ImagePart, shrink
from components.runtime.storage.artifact import Artifact
from components.sampling.images import from_uint8

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
    """Places among CHOICES of what is true of a scene, NO_ANSWER where nothing is."""
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
