"""Laws of what images are asked for and what independent networks see in them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.configuration.conditions import DatasetInfo
from components.configuration.usage import UsageError
from components.data.held_out import held_out_arrays, read_split
from components.data.shards import BPE, Member, ShardIndex, View
from components.evaluation.agreement import (
    Agreement,
    AgreementConfig,
    AgreementStudy,
    Judge,
    caption_agreement,
    caption_ranks,
    class_agreement,
    cosines,
    known_parts,
    wanted_of,
)
from components.evaluation.features import feature_job
from components.evaluation.image_sets import held_out_parts, some_of, split_parts
from components.models.bundle import ModelBundle, save_bundle
from components.runtime.storage.store import Store
from components.training.batches import to_batch, with_positions
from components.training.tasks.recognition import ClassifierTask
from pipelines.recipes.catalog import load_recipe
from tests.image_sets import CAPTIONS, number_of, write_scenes, write_set
from tests.tiny_cascade import commit_model, write_cascade, write_models
from tests.tiny_text_image import classifier_config, contrastive_config, frozen_contrastive

SIDE = 8


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    store = Store(str(tmp_path_factory.mktemp("scenes")))
    return write_scenes(store, sizes=(40, 40, 40), resolution=SIDE)


def random_unit(*shape: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_who_knows_the_labels_is_always_right_and_shuffled_labels_get_chance() -> None:
    numbers = np.random.default_rng(0)
    asked = numbers.choice(5, 60, p=(0.5, 0.2, 0.1, 0.1, 0.1))
    assert class_agreement(asked, asked).accuracy == 1
    seen = np.where(numbers.random(60) < 0.7, asked, numbers.integers(0, 5, 60))
    turned = [class_agreement(seen, np.roll(asked, turn)) for turn in range(60)]  # every label meets every image once
    assert np.mean([each.accuracy for each in turned]) == pytest.approx(turned[0].chance)
    assert turned[0].accuracy > turned[0].chance > 1 / 5  # a frequent class is met more often


def test_a_rank_counts_nearer_captions_and_does_not_depend_on_their_order() -> None:
    image, text, own = random_unit(20, 6, seed=1), random_unit(9, 6, seed=2), np.arange(20) % 9
    ranks = caption_ranks(cosines(image, text), own)
    assert ranks[3] == 1 + sum(image[3] @ other > image[3] @ text[own[3]] for other in text)
    order = np.random.default_rng(3).permutation(9)
    np.testing.assert_array_equal(caption_ranks(cosines(image, text[order]), np.argsort(order)[own]), ranks)
    np.testing.assert_array_equal(caption_ranks(cosines(text, text), np.arange(9)), 1)


def test_equal_captions_share_their_ranks_and_every_caption_as_the_own_one_gives_chance() -> None:
    image, text = random_unit(7, 6, seed=4), random_unit(5, 6, seed=5)
    twins = text[[0, 0, 0, 1, 1]]
    every = [caption_ranks(cosines(image, twins), np.full(7, own)) for own in range(5)]
    np.testing.assert_array_equal(every[0], every[2])
    assert set(every[0].tolist()) <= {2.0, 4.0}  # three that share the places 1 to 3, or 3 to 5
    np.testing.assert_array_equal(np.sum(every, axis=0), 15)  # whatever is nearer, ranks are those of 1 to 5
    ignorant = caption_ranks(cosines(image, text[[0] * 5]), np.full(7, 3))
    np.testing.assert_array_equal(ignorant, (5 + 1) / 2)
    image, text = random_unit(6, 4, seed=6), random_unit(8, 4, seed=7)
    found = caption_agreement(cosines(image, text).repeat(8, axis=0), np.tile(np.arange(8), 6))
    assert found.accuracy == found.chance == 1 / 8
    assert found.median_rank == (8 + 1) / 2


def test_held_out_images_under_their_own_label_get_the_accuracy_of_the_classifier(scenes: ShardIndex, tmp_path: Path):
    held_out = held_out_arrays(scenes, View(SIDE), limit=100)
    config, dataset_info = classifier_config(noisy=False), DatasetInfo(num_classes=len(scenes.classes))
    task = ClassifierTask(config, dataset_info=dataset_info)
    for parameter in task.learner.snapshot().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = with_positions(to_batch(held_out, torch.device("cpu")))
    mean = task.logits(task.learner.snapshot(), batch["image"], batch).mean(dim=0)
    task.learner.snapshot().pool.proj.bias.data -= mean  # not the same class for all
    settings = {"resolution": SIDE, "noisy": False, "objective": config.process.objective()}
    bundle = ModelBundle("classifier", config.network_arguments(dataset_info), settings, task.learner.snapshot())
    save_bundle(tmp_path / "judge", bundle)
    classifier = commit_model(tmp_path, "judge", "k", tmp_path / "judge")
    wanted = wanted_of(scenes, samples=100)["label"]
    parts = known_parts(scenes, [*wanted], resolution=SIDE)
    seen = np.concatenate([Judge(classifier)(part) for part in parts])
    found = class_agreement(seen, np.array([request.label for request in wanted.values()]))
    assert found.count == len(held_out["label"]) > 5
    shown = np.concatenate([images for part in parts for images in part.batches()])
    np.testing.assert_array_equal(shown, held_out["image"])
    assert len({*seen.tolist()}) > 1
    assert found.accuracy == pytest.approx(task.evaluate(held_out)["held_out_accuracy"])


def test_a_matcher_ranks_captions_of_images_of_any_larger_size(scenes: ShardIndex, tmp_path: Path) -> None:
    """Images of 16² are seen as the means of their four pixels."""
    encoder = frozen_contrastive()
    vocab_size = encoder.text.bpe.get_vocab_size()
    dataset_info = DatasetInfo(num_classes=3, vocab_size=vocab_size, text_length=encoder.text.text_length)
    network = contrastive_config().network_arguments(dataset_info)
    save_bundle(tmp_path / "m", ModelBundle("contrastive", network, {"resolution": SIDE}, encoder.network))
    encoder.text.bpe.save(str(tmp_path / "m" / BPE))
    ranker = Judge(commit_model(tmp_path, "matcher", "k", tmp_path / "m"), ("a red circle", "a blue square"))
    images = np.random.default_rng(8).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    given: list[Any] = [SimpleNamespace(batches=lambda each=each: iter([each])) for each in (images, large)]
    small, of_large = (ranker(part) for part in given)
    assert small.shape == (4, 2)
    assert len(np.unique(small)) == 8
    np.testing.assert_array_equal(small, of_large)


def test_held_out_images_are_those_that_the_requests_are_taken_from(tmp_path: Path) -> None:
    """An image of this set tells its number, and its number its label and its caption."""
    index = write_set(Store(str(tmp_path)), sizes=(30, 30, 30), holdout_fraction=0.3)
    wanted = wanted_of(index, samples=8)
    assert len(wanted["label"]) == 8
    asked = {by: [(each.label, each.prompt) for each in requests.values()] for by, requests in wanted.items()}
    assert sorted(prompt for _, prompt in asked["prompt"]) == sorted(CAPTIONS)  # each once
    assert {prompt for _, prompt in asked["label"]} == {label for label, _ in asked["prompt"]} == {None}
    whole = write_set(Store(str(tmp_path / "whole")), sizes=(6,), holdout_fraction=0.0)  # then of training images
    for of, by, requests in [(index, *each) for each in wanted.items()] + [
        (whole, "label", wanted_of(whole, 4)["label"])
    ]:
        parts = known_parts(of, [*requests], resolution=SIDE)
        numbers = np.concatenate([number_of(images) for part in parts for images in part.batches()])
        kinds = [each.label if by == "label" else CAPTIONS.index(str(each.prompt)) for each in requests.values()]
        np.testing.assert_array_equal(numbers % 3, kinds)


def test_some_of_the_parts_are_the_images_of_these_numbers(scenes: ShardIndex) -> None:
    parts = split_parts(scenes, "train", resolution=SIDE)
    every = np.concatenate([images for part in parts for images in part.batches()])
    chosen = np.array([0, 3, len(every) // 2, len(every) - 1])
    some = np.concatenate([images for part in some_of(parts, chosen) for images in part.batches()])
    np.testing.assert_array_equal(some, every[chosen])


@pytest.mark.parametrize("member", ["depth", "mask"])
def test_parts_of_another_member_hold_it_and_have_features_of_their_own(scenes: ShardIndex, member: Member) -> None:
    """An autoencoder of depth is judged by depth maps."""
    plain, (part, *_) = (held_out_parts(scenes, resolution=SIDE, limit=5, member=own) for own in ("image", member))
    expected = read_split(scenes, "holdout", View(SIDE, member), limit=part.num_images).image
    found = np.concatenate([*part.batches()])
    np.testing.assert_array_equal(found, expected[: len(found)])
    assert feature_job(part).name != feature_job(plain[0]).name
    assert part._replace(rows=(0,)).member == member


def test_a_generator_is_asked_for_what_it_takes_and_by_one_condition_alone(tmp_path: Path) -> None:
    """The tiny cascade takes three classes, and captions of its words."""
    index = write_set(Store(str(tmp_path / "images")), sizes=(30, 30), holdout_fraction=0.3)
    judges = {name: commit_model(tmp_path, name, "k", write_cascade(tmp_path / name)) for name in ("cascade",)}
    judges["judge"] = commit_model(tmp_path, "judge", "k", write_models(tmp_path / "judge")["base"])
    plan = AgreementStudy(AgreementConfig(samples=4, seed=5), index, judges, Store(str(tmp_path / "f")), "s").plan()
    (job,) = plan.groups["tokens label"]
    labels = [request.label for request in wanted_of(index, 4)["label"].values()]
    made = [(label, None, 5 + number, "tokens") for number, label in enumerate(labels)]
    assert [(r.label, r.prompt, r.seed, r.generator) for r in job.requests] == made
    asked = plan.facts[1]["label"]
    assert [*asked] == ["diffusion branch", "token branch", "held-out images"]
    assert asked["token branch"].asked == asked["held-out images"].asked == labels


def test_tables_and_figures_show_held_out_images_and_chance_beside_each_branch() -> None:
    label = {"token branch": Agreement(100, 0.5, 0.2), "held-out images": Agreement(100, 0.8, 0.2)}
    prompt = {"token branch": Agreement(50, 0.1, 0.02, 9.5, 50)}
    study: Any = AgreementStudy(AgreementConfig(), None, {}, None, "agreement")
    found = study.findings(None, {"label": label, "prompt": prompt})
    by_label, by_prompt = found.tables.values()
    assert by_label["rows"][0] == ["token branch", 0.5, 0.05, 0.2, 100]
    (row,) = by_prompt["rows"]
    assert dict(zip(by_prompt["columns"], row, strict=True))["chance of it"] == 25.5
    assert found.summary["accuracy_label_held_out_images"] == 0.8
    assert found.summary["median_rank_prompt_token_branch"] == 9.5
    assert found.headline["class seen, token branch (N 100)"] == 0.5


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["agreement.judge.noisy=true"], ["agreement", "judge.noisy must be false"]),
        (["agreement.judge.resolution=128"], ["agreement.judge.data.resolution must be at most 64"]),
        (["agreement.judge=null", "agreement.matcher=null"], ["judge and matcher are missing"]),
    ],
)
def test_a_recipe_whose_judges_can_not_judge_is_refused(assignments: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("openmoji", assignments)
    assert all(word in str(caught.value) for word in words), caught.value
