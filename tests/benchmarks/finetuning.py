"""Steps that a start saves: OpenMoji's base, trained on Tux Paint's stamps from random weights, whole from the base's
(`init_from`), and by an adapter of it (LoRA).

    python -m tests.benchmarks.finetuning /usr/share/tuxpaint/stamps --out runs/finetuning

The stamps are of Debian's package tuxpaint-stamps-default: other drawings, in classes of their own, so that the table
of classes is new. Networks, batch and schedule are the rows' at 16²; each way has the best of the same RATES in whole
trainings of another seed. A start has SHARE of the steps from random weights. Distances are to all stamps, by the
average's samples of the stamps' own classes. Each finished training is a line of `rows.jsonl`, and the same command
goes on behind it; `finetuning.svg` is drawn of all."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.data.sources.folder import list_folder
from components.data.sources.packaged import list_openmoji
from components.data.sources.source import Source
from components.evaluation.features import FeatureExtractor, MeasureConfig
from components.evaluation.metrics import frechet_distance, gaussian_of
from components.evaluation.plots import Panel, Series, plot_svg
from components.models.bundle import ModelBundle, save_bundle
from components.models.diffusion.samplers import sample
from components.sampling.images import levels_to_uint8
from components.training.batches import to_batch
from components.training.step_model import task_maker
from components.weights.starts import start_loader
from pipelines.recipes import systems
from tests.benchmarks.interleaving import one_thread
from tests.evidence import commit, machine

STEPS, SHARE, BASE_STEPS = 2000, 0.4, 4000
RATES, SEEDS, SEARCH_SEED = (3e-4, 1e-3, 3e-3), (1, 2, 3), 0
SAMPLED, SAMPLING_STEPS = 128, 10
TARGETS = ("qkv", "proj", "conv_1", "conv_2")  # the adapter's: attention is too small a part of this network
ADAPTER = {"rank": 8, "alpha": 8, "targets": TARGETS}
WAYS = ("scratch", "init_from", "lora")
Row = dict[str, Any]


def config_of(way: str, *, steps: int, rate: float, seed: int, base: Path) -> DiffusionTraining:
    """The training of a way on any set."""
    numbers = {"total_steps": steps, "learning_rate": rate, "seed": seed, "warmup_steps": 20, "global_batch_size": 16}
    start = {} if way == "scratch" else {"init_from": {"uri": str(base), "ignore": ("class_embedding",)}}
    parts = start | ({"adapter": ADAPTER} if way == "lora" else {})
    return systems.sketching().replace(precision="fp32", model_channels=16, **numbers, **parts)


def images_of(source: Source, kept: Path) -> dict[str, np.ndarray]:
    """Images uint8 (N, 16, 16, 3) and labels (N,) of a set, drawn once."""
    if not kept.exists():
        read, draw = source.reader.read, partial(source.reader.draw, resolution=16)
        drawn = np.stack([np.asarray(draw(item, read(item)).image) for item in source.items])
        np.savez(kept, image=drawn, label=np.array([item.label for item in source.items]))
    with np.load(kept) as file:
        return {"image": file["image"], "label": file["label"]}


def batches(images: dict[str, np.ndarray], config: DiffusionTraining) -> Iterator[dict[str, np.ndarray]]:
    """Batches in a new order each epoch."""
    numbers, size, position = np.random.default_rng(config.optimization.seed), config.optimization.global_batch_size, 0
    while True:
        order = numbers.permutation(len(images["label"]))
        for first in range(0, len(order) - size + 1, size):
            rows = {name: rows[order[first : first + size]] for name, rows in images.items()}
            yield rows | {"position": np.arange(position, position + size)}
            position += size


class Distances:
    """Distances of a task's samples to the images of a set."""

    def __init__(self, images: dict[str, np.ndarray]) -> None:
        self.extract = FeatureExtractor(MeasureConfig())
        self.reference = gaussian_of(self.extract(images["image"])["features"])
        chosen = np.random.default_rng(0).permutation(len(images["label"]))[:SAMPLED]
        self.rows = {name: rows[chosen] for name, rows in images.items()} | {"position": np.arange(SAMPLED)}

    def __call__(self, task: Any) -> float:
        batch = to_batch(self.rows)
        noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(0))
        how: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": SAMPLING_STEPS}
        network = task.guided(batch, {}, 1.0)
        made = sample(
            network, task.objective, noise.to(memory_format=torch.channels_last), noise=lambda _: torch.empty(0), **how
        )
        return frechet_distance(gaussian_of(self.extract(pixels(made))["features"]), self.reference)


def pixels(images: torch.Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] as uint8 (N, H, W, 3)."""
    return levels_to_uint8((images.clamp(-1, 1) + 1) * 127.5)


def trained(config: DiffusionTraining, images: dict[str, np.ndarray], measure: Any, points: list[int]) -> Any:
    """The task after its training, and distances by step."""
    info = DatasetInfo(num_classes=int(images["label"].max()) + 1, vocab_size=300, text_length=8)
    torch.manual_seed(config.optimization.seed)
    task = task_maker(config, dataset_info=info, grid=None)(load_start=start_loader(config, info, None, bpe=None))
    curve, stream = dict[int, float](), batches(images, config)
    for step in range(1, config.optimization.total_steps + 1):
        task.train_step(to_batch(next(stream)), step)
        if step in points:
            curve[step] = round(measure(task), 2)
            print(step, curve[step], flush=True)
    return task, curve


class Study:
    """Trainings by name; each that is finished is kept in a file."""

    def __init__(self, stamps: str, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.file, self.base = out, out / "rows.jsonl", out / "base"
        self.rows: list[Row] = (
            [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        )
        self.emoji = images_of(list_openmoji(), out / "openmoji.npz")
        self.stamps = images_of(list_folder(stamps), out / "stamps.npz")
        self.to_stamps = Distances(self.stamps)

    def run(self, way: str, *, steps: int, points: list[int], rate: float, seed: int) -> Row:
        """The row of a training, which is trained unless there is one; the base is the one that is never measured."""
        name = f"{way} at {rate:g} for {steps}, seed {seed}" if points else "base"
        for row in self.rows:
            if row["name"] == name:
                return row
        print(name, flush=True)
        config, begun = config_of(way, steps=steps, rate=rate, seed=seed, base=self.base), time.process_time()
        task, curve = trained(config, self.emoji if name == "base" else self.stamps, self.to_stamps, points)
        if name == "base":
            arguments = config.network_arguments(task.dataset_info)
            save_bundle(self.base, ModelBundle(config.network.kind, arguments, {}, task.learner.snapshot()))
        parameters = [each for each in task.learner.network.parameters() if each.requires_grad]
        row = {"name": name, "way": way, "rate": rate, "seed": seed, "curve": curve, "commit": commit()}
        row |= {"cpu_seconds": round(time.process_time() - begun), "trained": sum(each.numel() for each in parameters)}
        with self.file.open("a") as file:
            file.write(json.dumps(row | machine()) + "\n")
        self.rows.append(json.loads(json.dumps(row)))
        return self.rows[-1]

    def rate(self, way: str) -> float:
        """The rate of the smallest distance after a training of another seed."""
        steps = STEPS if way == "scratch" else int(SHARE * STEPS)
        rows = [self.run(way, rate=rate, steps=steps, points=[steps], seed=SEARCH_SEED) for rate in RATES]
        return min(rows, key=lambda row: row["curve"][str(steps)])["rate"]

    def measured(self) -> dict[str, list[Row]]:
        """Rows of each way, of all seeds; all ways of a seed before the next."""
        self.run("scratch", steps=BASE_STEPS, points=[], rate=1e-3, seed=SEARCH_SEED)
        rates, own = {way: self.rate(way) for way in WAYS}, int(SHARE * STEPS)
        rows: dict[str, list[Row]] = {way: [] for way in WAYS}
        for seed in SEEDS:
            for way in WAYS:
                steps = STEPS if way == "scratch" else own
                points = [*range(own // 4, own + 1, own // 4), *range(own + STEPS // 5, steps + 1, STEPS // 5)]
                how: dict[str, Any] = {"steps": steps, "points": points, "rate": rates[way], "seed": seed}
                rows[way].append(self.run(way, **how))
        return rows


def reached(row: Row, distance: float) -> str:
    """The first measured step at or below a distance."""
    return next((step for step, own in row["curve"].items() if own <= distance), f"not in {[*row['curve']][-1]}")


def table(rows: dict[str, list[Row]]) -> Iterator[str]:
    """Lines of Markdown: each way's last distances, and steps to the last one from random weights, by seed."""
    yield "| way | rate | trained parameters | steps | distance | steps to scratch's distance |"
    yield "|---|---|---|---|---|---|"
    ends = [[*row["curve"].values()][-1] for row in rows["scratch"]]
    for way, own in rows.items():
        lasts = " ".join(f"{[*row['curve'].values()][-1]:.1f}" for row in own)
        steps = ", ".join(reached(row, end) for row, end in zip(own, ends, strict=True))
        yield f"| {way} | {own[0]['rate']:g} | {own[0]['trained']:,} | {[*own[0]['curve']][-1]} | {lasts} | {steps} |"


def drawn(rows: dict[str, list[Row]]) -> str:
    """Mean distance by step as an SVG."""
    series = []
    for way, own in rows.items():
        values = np.array([[*row["curve"].values()] for row in own])
        errors = values.std(axis=0, ddof=1) / len(own) ** 0.5
        series.append(Series(way, [int(step) for step in own[0]["curve"]], [*values.mean(axis=0)], [*errors]))
    return plot_svg([Panel("steps", "distance to the stamps", series)], salt="finetuning")


def main(
    stamps: Annotated[str, typer.Argument(help="folder with a folder of images for each class")],
    out: Annotated[Path, typer.Option(help="for images, models and rows")] = Path("runs/finetuning"),
) -> None:
    """Trains what is not trained yet, and prints the table."""
    with one_thread():
        rows = Study(stamps, out).measured()
    (out / "finetuning.svg").write_text(drawn(rows))
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    typer.run(main)
