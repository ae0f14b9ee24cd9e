"""A version is the champion by merit: not by more than their error worse than the champion, measured as that was."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.names import BEFORE, DECISION, FIGURES, REASON
from components.runtime.tracking.promotion import Promotion, champion_of, compared, figures_of, promote_run
from components.runtime.tracking.tracker import Tracker
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.serving.settings import ServedModel
from components.serving.versions import Versions
from pipelines.command.cli import app
from tests.tiny_cascade import commit_model
from tests.tiny_generators import lone
from tests.waiting import eventually

NAME = "image-cascade-tiny"
CHAMPION = f"models:/{NAME}@champion"


def row(name: str, distance: float, *, error: float | None = 3.0, samples: int = 256) -> dict:
    return {"name": name, "distance": distance, "standard_error": error, "samples": samples, "purpose": "model"}


def evaluation(*rows: dict, images: str = "i1", network: str = "efficientnet_lite0", seed: int = 0) -> Artifact:
    scale = {"name": "noise", "distance": 381.0, "samples": 256, "purpose": "scale", "standard_error": 1.0}
    summary = {f"fd_{network}_{number}": each["distance"] for number, each in enumerate(rows)}
    return Artifact(
        kind="report",
        stage="evaluation",
        key=f"e{rows}{images}{network}{seed}".replace(" ", "")[:60].translate({ord(c): "-" for c in "[]{}()'\",:²/"}),
        files=(),
        metadata={"feature_network": network, "distances": [scale, *rows], "summary": summary},
        inputs={"images": images},
        provenance={"config": {"precision": "fp32", "reference_samples": 10_000, "seed": seed}},
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cascades(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """By key."""
    made = {}
    for number in range(4):
        home = tmp_path_factory.mktemp(f"k{number}")
        folder = lone("gan", home / "model")
        made[f"k{number}"] = commit_model(home, "cascade", f"k{number}", folder)
    return made


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_database, tmp_path)}"


@pytest.fixture
def run(uri: str, cascades: dict[str, Artifact], tmp_path: Path) -> Callable[..., Promotion]:
    """A run that registers the cascade of a key and measures it."""

    def end(key: str, measured: Artifact | None, *, promote: events.Promote = "better") -> Promotion:
        tracker = Tracker(uri, experiment="tiny", spool=tmp_path / "spool", flush_seconds=0.3)
        tracker.emit(events.RunStarted(f"run-{key}", "", {}, {"name": "tiny"}))
        tracker.emit(events.StageCached("cascade", cascades[key]))
        if measured is not None:
            tracker.emit(events.StageCached("evaluation", measured))
        assert tracker.close("FINISHED", promote=promote) == []
        assert tracker.delivery is not None
        promotion = tracker.delivery.promotions[tracker.log.run]
        return promotion

    return end


def distance(value: float, **how: str | int) -> Artifact:
    return evaluation(row("gan branch, 16²", value), **how)


def test_a_worse_run_moves_no_alias_a_better_one_does_and_each_version_says_why(run: Callable, uri: str):
    client = MlflowClient(uri)

    def reason(version: str) -> str:
        return client.get_model_version(NAME, version).tags[REASON]

    assert run("k0", distance(361)).promoted
    assert (champion_of(client, NAME), reason("1")) == ("1", "the first of its name")
    worse = run("k1", distance(384))
    assert champion_of(client, NAME) == "1"
    assert worse == Promotion(NAME, "2", False, "distance: gan branch 384, the champion's 361 ± 4.2")
    assert reason("2") == worse.reason
    assert worse.lines()[0] == f"model: models:/{NAME}/2"
    assert worse.lines()[1].endswith(f"cascade promote {NAME}@2")
    assert run("k2", distance(364)).promoted, "worse by less than the error of the difference"
    assert champion_of(client, NAME) == "3"
    assert client.get_model_version(NAME, "3").tags[BEFORE] == "1"
    assert run("k2", distance(364)).reason == "it is the champion already"
    assert reason("3").startswith("distance: gan branch 364, the champion's 361"), "why it became that stays"
    assert not run("k1", distance(384), promote="never").promoted
    assert not run("k3", None).promoted
    assert champion_of(client, NAME) == "3"
    assert run("k1", distance(384), promote="always").lines() == [f"model: {CHAMPION} (version 2: --promote always)"]
    assert champion_of(client, NAME) == "2"


def test_metrics_rank_the_versions_and_stand_in_the_run(run: Callable, uri: str):
    run("k0", distance(361))
    run("k1", distance(98))
    client, name = MlflowClient(uri), "fd_efficientnet_lite0_0"
    experiment = client.get_experiment_by_name("tiny").experiment_id
    ranked = client.search_logged_models([experiment], order_by=[{"field_name": f"metrics.{name}", "ascending": True}])
    assert [model.tags["cascade.stage_key"] for model in ranked] == ["k1", "k0"]
    assert {metric.key: metric.value for metric in ranked[0].metrics} == {name: 98}
    runs = client.search_runs([experiment], "tags.`cascade.stage_key` = 'workflow'")
    assert sorted(each.data.metrics[name] for each in runs) == [98, 361]


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (distance(10, images="i2"), "the champion was measured by another set of images"),
        (distance(10, network="inception"), "the champion was measured by another feature network"),
        (distance(10, seed=1), "the champion was measured by another seed"),
        (
            evaluation(row("gan branch, 16²", 10, samples=512)),
            "the champion was measured by another number or size of images (gan branch)",
        ),
        (evaluation(row("gan branch, 32²", 10)), "the champion was measured by another number or size of images"),
        (evaluation(row("gan branch, 16²", 10, error=None)), "too few images for an error (gan branch)"),
        (evaluation(row("token branch, 16²", 10)), "it makes no gan branch, which the champion does"),
        (evaluation(row("gan branch, 16²", float("nan"))), "distance: gan branch nan"),
        (evaluation(), "the run measured no distance of it"),
    ],
)
def test_what_cannot_be_compared_is_not_promoted(measured: Artifact, why: str):
    promoted, reason = compared(figures_of(measured), figures_of(distance(361)))
    assert not promoted
    assert why in reason


def test_every_generator_of_the_champion_counts_by_its_finished_images_and_an_autoencoder_by_what_it_keeps():
    kept = row("reconstructions of held-out images", 70)
    base, upsampler = row("diffusion branch: base, 16²", 300), row("diffusion branch: upsampler 64, 64²", 98)
    champion = figures_of(evaluation(kept, base, upsampler, row("token branch, 64²", 80)))
    assert {name: figure.distance for name, figure in champion.made.items()} == {
        "diffusion branch": 98,
        "token branch": 80,
    }
    assert compared(figures_of(evaluation(upsampler, row("token branch, 64²", 80))), champion)[0]
    one_worse = evaluation(row("diffusion branch: upsampler 64, 64²", 50), row("token branch, 64²", 90))
    assert not compared(figures_of(one_worse), champion)[0]
    trained = row("reconstructions of training images", 70)
    assert figures_of(evaluation(trained, base)).made.keys() == {"diffusion branch"}
    for alone in (kept, trained):
        assert figures_of(evaluation(alone)).made.keys() == {alone["name"]}


def test_the_champion_is_compared_by_what_was_measured_in_the_same_way_at_any_time(run: Callable, uri: str):
    run("k0", distance(361))
    run("k0", distance(300, seed=1))  # the champion once more, in another way
    assert MlflowClient(uri).get_model_version(NAME, "1").tags[FIGURES].count('"images"') == 2
    assert run("k1", distance(350)).promoted


def test_an_end_that_is_delivered_twice_moves_nothing_the_second_time(run: Callable, uri: str):
    run("k0", distance(361))
    run("k1", distance(98))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    wanted = "tags.`cascade.run` = 'run-k1' and tags.`cascade.stage_key` = 'workflow'"
    (parent,) = client.search_runs([experiment], wanted)
    ended = json.loads(parent.data.tags[DECISION])["ended"]
    again = {"models": "tiny", "how": "better", "ended": ended}
    assert promote_run(client, parent.info.run_id, **again).promoted
    assert client.get_model_version(NAME, "2").tags[BEFORE] == "1"
    assert command("promote", f"{NAME}@1", uri=uri)[0] == 0
    promote_run(client, parent.info.run_id, **again)
    assert champion_of(client, NAME) == "1"


def command(*arguments: str, uri: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*arguments, "--tracking", uri])
    return done.exit_code, done.output if done.exception is None else str(done.exception)


def test_a_champion_is_made_by_hand_and_taken_back(run: Callable, uri: str):
    run("k0", distance(361))
    run("k1", distance(384))
    client = MlflowClient(uri)
    code, said = command("promote", f"models:/{NAME}/2", uri=uri)
    assert (code, champion_of(client, NAME)) == (0, "2")
    assert said.strip() == f"{CHAMPION} is version 2; to take it back: cascade promote {NAME}@1"
    assert client.get_model_version(NAME, "2").tags[REASON] == "by hand"
    assert command("promote", NAME, "--back", uri=uri)[0] == 0
    assert champion_of(client, NAME) == "1"
    for wrong, why in (
        ([NAME, "--back"], "had no champion before this one"),
        ([f"{NAME}@7"], f"can't promote {NAME}@7"),
        ([f"{NAME}@champion"], "names no version: write NAME@VERSION"),
        (["nobody", "--back"], "can't promote nobody"),
    ):
        code, said = command("promote", *wrong, uri=uri)
        assert code != 0
        assert why in said
        assert "\n" not in said.strip()
    assert champion_of(client, NAME) == "1"


def test_a_service_that_follows_the_champion_loses_no_request(run: Callable, uri: str, cascades: dict[str, Artifact]):
    run("k0", distance(361))
    watched = Versions(ServedModel(name="tiny", source=CHAMPION), tracking=uri, poll_seconds=0.1)
    request, answers, over = Request(label="1", seed=3), [], threading.Event()

    def ask() -> None:
        while not over.is_set():
            version = watched.current
            answers.append((version.named.version, version.cascade.sample([request])[0]))

    asking = threading.Thread(target=ask)
    asking.start()
    run("k1", distance(384))
    assert watched.card.refused == ""
    run("k2", distance(98))
    assert eventually(lambda: watched.current.named.version == "3")
    assert eventually(lambda: answers[-1][0] == "3")
    over.set()
    asking.join()
    watched.close()
    numbers = [number for number, _ in answers]
    assert numbers == sorted(numbers)
    assert set(numbers) == {"1", "3"}
    with cascades["k0"].local_copy() as folder:
        (wanted,) = Cascade.load(folder).sample([request])
    assert all(np.array_equal(image, wanted) for _, image in answers), "the tiny models are alike"
