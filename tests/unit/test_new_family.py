"""A new model family is a row in each of three tables: the stage, the bundle and the plan take it from there."""

from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch import Tensor, nn

from components.configuration.conditions import TokenGrid
from components.configuration.families import FAMILIES, Family, family_name, family_of
from components.configuration.networks import NetworkConfig
from components.configuration.optimization import OptimizationConfig, Training, TrainingNeeds
from components.configuration.trainings import ImageData
from components.models.bundle import NETWORKS, load_bundle
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.stages.images import ImagesConfig, ingest_images
from components.stages.training import train_model
from components.training import launch
from components.training.batches import to_batch, with_positions
from components.training.learner import DISCRIMINATORS, LearnerTask
from components.training.loop import Batch, Metrics, fit
from components.training.parallel import ALONE
from components.training.results import finish
from components.training.step_model import TASKS
from components.training.worker import TrainingJob
from pipelines.planning.cost import stage_costs
from pipelines.planning.profiles import parse_cluster
from pipelines.workflow import Stage, Workflow
from tests.distributed.runs import context_of, images_artifact

SIDE, STEPS = 8, 200


class ColorConfig(NetworkConfig):
    kind: Literal["color"] = "color"
    start: float = 0.0


class ColorTraining(Training):
    """One color for all images."""

    network: ColorConfig = ColorConfig()
    data: ImageData = ImageData(resolution=SIDE)
    optimization: OptimizationConfig = OptimizationConfig(
        total_steps=STEPS, global_batch_size=4, learning_rate=0.05, ema_decay=0.9
    )

    def needs(self) -> TrainingNeeds:
        return TrainingNeeds(self.data.resolution)

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {"resolution": self.data.resolution, "classes": list(classes)}


class Color(nn.Module):
    def __init__(self, *, start: float) -> None:
        super().__init__()
        self.color = nn.Linear(1, 3, bias=False)
        nn.init.constant_(self.color.weight, start)

    def forward(self, image: Tensor) -> Tensor:
        color = self.color(image.new_ones(len(image), 1))  # (B, 3)
        return color[:, :, None, None].expand_as(image)


class ColorTask(LearnerTask):
    def part_losses(self, part: Batch) -> Metrics:
        return {"loss": (self.learner.forward(part["image"]) - part["image"]).square().mean()}

    def measures(self, network: Color, part: Batch) -> Metrics:
        return {"color": network.color.weight.mean()}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    family = Family("One color", ColorTraining, ("color",))
    monkeypatch.setitem(FAMILIES, "color", family)
    monkeypatch.setitem(NETWORKS, "color", Color)
    monkeypatch.setitem(TASKS, "color", ColorTask)
    return family


def train_here(job: TrainingJob) -> bool:
    """Train in this process, on the held-out images again and again."""
    task, held_out = job.make_task(worker=ALONE), job.held_out()
    batch = with_positions(to_batch(held_out))
    fit(task, repeat(batch), job.config)
    finish(
        job.run,
        job.store,
        job.model,
        weights=task.state_dict()["weights"],
        summary=task.evaluate(held_out),
        previews=task.preview(held_out, STEPS),
    )
    return False


@pytest.fixture
def trained(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Artifact, float]:
    """The model of the new family, and the mean of what it was trained on, in [-1, 1]."""
    means: list[float] = []

    def watched(job: TrainingJob) -> bool:
        means.append(float(np.mean(job.held_out()["image"]) / 127.5 - 1))
        return train_here(job)

    monkeypatch.setattr(launch, "run_trainer", watched)
    context = context_of(tmp_path, "color", workers=1)
    return train_model(ColorTraining(), context, images=images_artifact(tmp_path)), means[0]


def test_the_stage_trains_a_new_family_and_its_bundle_loads(trained: tuple[Artifact, float], tmp_path: Path) -> None:
    artifact, mean = trained
    bundle = load_bundle(artifact.download(tmp_path / "model"))
    assert (bundle.kind, bundle.network, bundle.settings["resolution"]) == ("color", {"start": 0.0}, SIDE)
    color = bundle.module.get_parameter("color.weight").mean().item()
    assert abs(color - mean) < 0.02
    assert artifact.metadata["summary"]["color"] == pytest.approx(color)


def test_the_plan_counts_a_new_family(family: Family) -> None:
    ingest = ImagesConfig(
        source="scenes", resolution=SIDE, samples_per_shard=24, holdout_fraction=0.2, vocab_size=300, text_length=16
    )
    images = Stage("images", ingest_images, ingest)
    workflow = Workflow("color", [images, Stage("color", train_model, ColorTraining(), images=images)])
    (cost,) = stage_costs(
        workflow, {"color": Resources(num_workers=2, gpus_per_worker=1)}, parse_cluster("gpus=2,type=h100")
    )
    assert (cost.stage, cost.step_flops) == ("color", 4 * 2 * (3 + 3))  # forward, and backward to the weights
    assert cost.written == 4 * 12 + 12  # weights, average and two moments of 3 numbers in one checkpoint; the model
    assert family_of("color").whole is None


def test_an_unknown_kind_is_named_with_the_file_to_add_it_to() -> None:
    with pytest.raises(ValueError, match=r"kind 'color'; add it to components/configuration/families\.py"):
        family_name("color")


def test_the_tables_of_networks_tasks_and_discriminators_name_what_the_table_of_families_names() -> None:
    kinds = [kind for family in FAMILIES.values() for kind in family.networks]
    assert sorted(kinds) == sorted(NETWORKS)
    assert TASKS.keys() == FAMILIES.keys()
    assert DISCRIMINATORS.keys() == {kind for kind in kinds if FAMILIES[family_name(kind)].stored}
    assert {family.training for family in FAMILIES.values()} == leaves(Training)


def leaves(kind: type) -> set[type]:
    """Subclasses of this repository's product that have none themselves."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("components.")]
    return set().union(*map(leaves, below)) if below else {kind}
