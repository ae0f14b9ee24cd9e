"""Scenes for models of captions: pairs held out of training, the judge, obedience by attribute."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from components.configuration.usage import UsageError
from components.data.held_out import read_split
from components.data.listing import SourceError
from components.data.shards import ShardIndex, View, split_of
from components.data.sources.scenes import (
    COLORS,
    GENERATOR_VERSION,
    LARGE,
    OWN_NUMBERS,
    SMALL,
    caption,
    draw_pairs,
    list_scenes,
    pair_of,
    render,
    scene,
)
from components.evaluation import obedience
from components.evaluation.obedience import NO_ANSWER, Told
from components.evaluation.study import AskedSet, StudyPlan
from components.runtime.storage.store import Store
from pipelines.recipes.catalog import load_recipe
from tests.image_sets import ingest_here
from tests.refusals import one_line

HELD_OUT = 0.2  # share of scenes


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    numbers = {"samples_per_shard": 50, "text_length": 12, "limit": 300, "held_out_pairs": 4}
    return ingest_here("scenes", None, tmp_path, holdout_fraction=HELD_OUT, **numbers)


def test_pairs_held_out_are_in_no_training_shard_and_in_held_out_captions(index: ShardIndex) -> None:
    assert index.held_out_pairs == draw_pairs(4)
    trained, held_out = (read_split(index, split, View(8)).caption for split in ("train", "holdout"))
    assert index.samples == 300
    for pair in index.held_out_pairs:
        assert not any(pair in text for text in trained)
        assert any(pair in text for text in held_out)
    learned = {word for text in trained for word in text.split()}
    assert {word for text in held_out for word in text.split()} <= learned


def test_scenes_are_those_of_their_version() -> None:
    """A set's key holds the version alone: a renderer that draws otherwise needs another, and other numbers here."""
    color, depth, mask = render(scene(1), resolution=64)
    seen = [(mask == 1).sum(), (mask == 2).sum(), *color.mean(axis=(0, 1)), depth.mean()]
    assert (GENERATOR_VERSION, *seen) == pytest.approx((2, 463, 258, 166.86, 171.23, 177.82, 5.877), rel=2e-4)


def test_without_held_out_pairs_every_scene_is_in_the_set_by_its_number() -> None:
    assert [item.location for item in list_scenes(50).items] == [str(number) for number in range(50)]
    kept = list_scenes(50, held_out_pairs=4, holdout_fraction=HELD_OUT).items
    assert [item for item in list_scenes(int(kept[-1].location) + 1).items if item in kept] == list(kept)


@pytest.mark.parametrize("count", [0, 4, len(COLORS)])
def test_pairs_are_drawn_once_for_all_and_leave_every_word_to_training(count: int) -> None:
    pairs = draw_pairs(count)
    assert pairs == draw_pairs(8)[:count]
    assert len({pair.split()[0] for pair in pairs}) == count
    assert max(Counter(pair.split()[1] for pair in pairs).values(), default=0) < len(COLORS) // 2


def test_held_out_pairs_of_another_source_are_refused_before_anything_starts() -> None:
    words = "held_out_pairs are colors with shapes of scenes, not of my_dog: set images.held_out_pairs=0"
    with one_line(UsageError, match=words):
        load_recipe("dit", ["images.source=my_dog"])
    assert load_recipe("dit", ["images.source=my_dog", "images.held_out_pairs=0"]).images.source == "my_dog"


def test_a_caption_says_what_its_scene_shows_and_is_read_back() -> None:
    for solids in map(scene, range(300)):
        told = obedience.parse_caption(caption(solids))
        assert told is not None
        assert told.pairs == tuple(map(pair_of, solids))
        if len(solids) == 1:
            assert told == Told(told.pairs, size="large" if solids[0].size >= LARGE else "small")
            assert not SMALL + 0.14 < solids[0].size < LARGE  # nothing between small and large
        else:
            assert told.side == ("left" if solids[0].x < solids[1].x else "right")
    assert obedience.parse_caption("a cat") is None


RED, BLUE = "red cube", "blue sphere"
LEFT, ALONE = Told((RED, BLUE), side="left"), Told((RED,), size="small")


@pytest.mark.parametrize(
    ("told", "seen", "wrong"),
    [
        (LEFT, Told((RED, BLUE)), []),
        (Told((BLUE, RED), side="right"), Told((RED, BLUE)), []),
        (LEFT, Told((BLUE, RED)), ["side"]),
        (LEFT, Told((RED, "green sphere")), ["color", "color and shape"]),
        (LEFT, Told((RED,), size="small"), ["color", "shape", "color and shape", "number", "side"]),
        (ALONE, Told((RED,), size="large"), ["size"]),
        (ALONE, Told((BLUE, RED)), ["number", "size"]),
        (Told((RED, RED), side="left"), Told((RED, RED)), []),
    ],
)
def test_an_image_obeys_each_attribute_by_itself(told: Told, seen: Told, wrong: list[str]) -> None:
    points = list(obedience.compare(told, seen, [BLUE]))
    assert [attribute for (attribute, _), right in points if not right] == wrong
    counted = Counter(attribute for (attribute, _), _ in points)
    assert counted["color"] == counted["shape"] == counted["color and shape"] == len(told.pairs)
    assert counted["side"] == (len(set(told.pairs)) > 1)
    unseen = {attribute for (attribute, group), _ in points if group == "unseen"}
    assert bool(unseen) == (BLUE in told.pairs)


def test_shares_of_true_scenes_are_whole_and_chance_is_not() -> None:
    scenes = list(map(scene, range(400)))
    read = np.array([[max(place, 0) for place in obedience.right_answers(solids)] for solids in scenes])
    assert [obedience.told_by(row).pairs for row in read[:9].tolist()] == [
        tuple(pair_of(each) for each in sorted(solids, key=lambda solid: solid.x)) for solids in scenes[:9]
    ]
    shares = obedience.shares_of([caption(solids) for solids in scenes], read, draw_pairs(4), seed=0)
    assert {group for _, group in shares} == {"seen", "unseen"}
    assert all(share.right == 1 for share in shares.values())
    assert abs(shares["number", "seen"].chance - 0.5) < 0.1
    assert shares["color", "unseen"].chance < 0.4


def test_each_generator_has_its_own_rows_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that read the same captions the one obeys, the other always makes the same scene."""
    scenes = list(map(scene, range(60)))
    captions, read = [caption(solids) for solids in scenes], np.array([*map(obedience.right_answers, scenes)]).clip(0)
    index = ingest_here("scenes", None, tmp_path, holdout_fraction=HELD_OUT, samples_per_shard=50, limit=300)
    study = obedience.ObedienceStudy(obedience.ObedienceConfig(), index, {}, Store(tmp_path), "")
    plan = StudyPlan({"obeys": [], "deaf": []}, facts={name: AskedSet([], captions) for name in ("obeys", "deaf")})
    monkeypatch.setattr(obedience, "drawn", lambda jobs, study: b"")
    found = study.findings(plan, {"obeys": read, "deaf": np.repeat(read[:1], len(read), axis=0)})
    columns, rows = found.tables[obedience.TITLE].values()
    assert [row[0] for row in rows] == ["obeys, seen pairs", "deaf, seen pairs"]
    assert columns == ["images", *obedience.ATTRIBUTES]
    assert all(cell.startswith("100.0 ± 0.0 (") for cell in rows[0][1:])
    assert all(float(cell.split()[0]) < 80 for cell in rows[1][1:])
    colors = {name: value for name, value in found.headline.items() if ", color, seen pairs" in name}
    assert [(name.split(",")[0], value == 100) for name, value in colors.items()] == [("obeys", True), ("deaf", False)]


def test_the_judge_learns_what_renderings_show_from_scenes_of_no_set() -> None:
    _, accuracy = obedience.train_judge(obedience.SceneJudgeConfig(renderings=600, steps=120, held_out=100))
    assert accuracy.keys() == obedience.CHOICES.keys()
    assert min(accuracy["number"], accuracy["size"]) > 0.9
    assert accuracy["color"] > 0.7
    with pytest.raises(SourceError, match="must be below 10,000,000"):
        list_scenes(OWN_NUMBERS + 1)


def test_a_judge_of_too_few_renderings_to_be_measured_by_is_not_trained() -> None:
    with one_line(ValueError, r"judge.held_out=1: these renderings do not show size; raise it"):
        obedience.train_judge(obedience.SceneJudgeConfig(held_out=1))


def test_answers_of_what_is_not_there_are_left_out() -> None:
    single = next(solids for solids in map(scene, range(50)) if len(solids) == 1)
    assert obedience.right_answers(single)[4:] == [NO_ANSWER, NO_ANSWER]
    assert torch.tensor(obedience.right_answers(single)[:4]).min() >= 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["images.source=openmoji", "images.held_out_pairs=0"], "obedience is to captions of scenes, not of openmoji"),
        (["base.conditions=[label]"], "obedience needs text among the conditions"),
    ],
)
def test_obedience_that_can_not_be_judged_is_refused(changes: list[str], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        load_recipe("stable_diffusion", changes)
    assert load_recipe("stable_diffusion", [*changes, "obedience=null"]).obedience is None


def test_half_of_the_captions_name_a_pair_that_is_not_trained_on(index: ShardIndex) -> None:
    held_out, unseen = read_split(index, "holdout", View(8)), index.held_out_pairs
    rows = obedience.chosen_rows(held_out, 20, unseen)
    assert rows == sorted(set(rows))
    assert sum(any(pair in held_out.caption[row] for pair in unseen) for row in rows) == 10
    assert all(split_of(held_out.key[row], HELD_OUT) == "holdout" for row in rows)
    with pytest.raises(ValueError, match="'a cat' is no caption of a scene"):
        obedience.chosen_rows(held_out._replace(caption=("a cat",)), 20, unseen)
