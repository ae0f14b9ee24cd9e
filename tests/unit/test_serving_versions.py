"""What answers is what the source names now; what can't be loaded never takes the place of what works."""

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from components.runtime.tracking.names import shown_source
from components.runtime.tracking.registry import Named
from components.sampling.cascade import DESCRIPTION, Cascade, quick
from components.sampling.requests import Request
from components.serving.settings import ServedModel
from components.serving.versions import Version, Versions, find_version
from tests.refusals import one_line
from tests.served_models import CHAMPION, NAME, Registry, write_other_cascade
from tests.tiny_cascade import CLASSES, commit_model, write_cascade
from tests.waiting import eventually

RED = Request(prompt="red apple", seed=3, generator="diffusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_cascade(tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_database: Path, folder: Path, other: Path) -> Registry:
    """Versions 1 and 2, and 3, which can't be loaded."""
    home = tmp_path_factory.mktemp("registry")
    made = Registry(home, empty_database)
    for key, each in {"k1": folder, "k2": other, "k3": broken(other, home)}.items():
        made.register(each, key=key)
    return made


@pytest.fixture
def registry(registered: Registry) -> Registry:
    """Version 1 is the champion."""
    registered.promote("1")
    return registered


def versions(source: str, tracking: str | None = None) -> Versions:
    return Versions(ServedModel(name="tiny", source=source), tracking=tracking, poll_seconds=0.2)


def broken(cascade: Path, folder: Path) -> Path:
    """A cascade whose description asks for a part that its models don't fit."""
    copied = Path(shutil.copytree(cascade, folder / "broken"))
    described = json.loads((copied / DESCRIPTION).read_text())
    described["sampling"]["base"]["num_inference_steps"] = 0
    (copied / DESCRIPTION).write_text(json.dumps(described))
    return copied


def test_an_alias_that_moves_changes_who_answers_and_not_who_answered(registry, folder, other):
    """Back too; a version that is asked for by its number stays."""
    watched, numbered = (versions(source, registry.uri) for source in (CHAMPION, f"models:/{NAME}/1"))
    first = watched.current
    assert (first.named.version, first.card.version) == ("1", "1")
    registry.promote("2")
    assert eventually(lambda: watched.current.named.version == "2")
    assert watched.current.card.version == "2"
    (old,), (new,) = first.cascade.sample([RED]), watched.current.cascade.sample([RED])
    assert np.array_equal(old, Cascade.load(folder).sample([RED])[0])
    assert np.array_equal(new, Cascade.load(other).sample([RED])[0])
    assert not np.array_equal(old, new)
    registry.promote("1")
    assert eventually(lambda: watched.current.named.version == "1")
    registry.promote("2")
    time.sleep(0.6)
    assert numbered.current.named.version == "1"
    watched.close()


def test_a_version_that_cannot_be_loaded_leaves_the_one_before_and_is_tried_once(registry, caplog):
    watched = versions(CHAMPION, registry.uri)
    with caplog.at_level(logging.WARNING, "cascade.serving"):
        registry.promote("3")
        assert eventually(lambda: "can't be loaded" in caplog.text)
        time.sleep(0.6)
    assert caplog.text.count("can't be loaded") == 1
    assert watched.current.named.version == "1"
    assert watched.card.refused == "3"
    registry.promote("1")
    assert eventually(lambda: not watched.card.refused), "the alias names what answers"
    registry.promote("2")
    assert eventually(lambda: watched.current.named.version == "2")
    watched.close()


def test_a_registry_that_is_away_is_told_once_and_found_again(registry, caplog):
    watched, database = versions(CHAMPION, registry.uri), Path(registry.uri.removeprefix("sqlite:///"))
    with caplog.at_level(logging.WARNING, "cascade.serving"):
        registry.client.delete_registered_model_alias(NAME, "champion")
        assert eventually(lambda: "version 1 goes on" in caplog.text)
        time.sleep(0.6)
    assert caplog.text.count("version 1 goes on") == 1
    assert database.is_file()
    registry.promote("2")
    assert eventually(lambda: watched.current.named.version == "2")
    watched.close()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("models:/image-cascade-none@champion", "can't get models:/image-cascade-none@champion from the registry at"),
        (f"models:/{NAME}@nobody", f"can't get models:/{NAME}@nobody"),
        (f"models:/{NAME}/7", f"can't get models:/{NAME}/7"),
        ("models:/m-0123456789abcdef0123456789abcdef", "names no version: write models:/NAME@ALIAS"),
        (f"models:/{NAME}", "names no version: write models:/NAME@ALIAS"),
    ],
)
def test_what_the_registry_has_not_is_one_line(registry, source, words):
    with one_line(ValueError, match="models:/") as caught:
        find_version(source, registry.uri)
    assert words in str(caught.value)


def test_a_registered_model_needs_a_registry():
    with pytest.raises(ValueError, match="name it with --tracking"):
        find_version(CHAMPION, None)


def test_a_folder_and_an_artifact_are_served_without_a_registry(folder, tmp_path):
    by_folder = versions(str(folder)).current
    committed = commit_model(tmp_path, "cascade", "abcdef0123456789", folder)
    by_artifact = versions(committed.root).current
    assert by_artifact.named.version == "abcdef012345"
    assert by_folder.card.source == "cascade"
    assert by_artifact.card.source == "abcdef0123456789"
    assert np.array_equal(by_folder.cascade.sample([RED])[0], by_artifact.cascade.sample([RED])[0])


def test_a_lone_model_that_makes_images_is_served_and_another_is_refused_with_a_sentence(folder):
    assert [generator.name for generator in versions(str(folder / "base")).current.card.generators] == ["diffusion"]
    with pytest.raises(ValueError, match="tokenizer makes no image: serve a composed cascade"):
        versions(str(folder / "tokenizer"))


def test_nobody_is_told_where_a_folder_lies():
    assert shown_source("/srv/secret/place/cascade/") == "cascade"
    assert shown_source("s3://bucket/runs/stages/cascade/k1") == "k1"
    assert shown_source(CHAMPION) == CHAMPION


def test_a_card_says_what_requests_may_say(folder):
    cascade = Cascade.load(folder)
    card = Version(ServedModel(name="tiny", source=CHAMPION), Named("champion", "1", 7), cascade).card
    assert (card.name, card.source, card.version, card.created) == ("tiny", CHAMPION, "1", 7)
    diffusion, tokens = card.generators
    assert (diffusion.name, diffusion.width, diffusion.height) == ("diffusion", 16, 16)
    assert (tokens.name, tokens.width, tokens.height) == ("tokens", 16, 16)
    assert diffusion.classes == tokens.classes == tuple(CLASSES)
    assert (diffusion.steps, diffusion.most_steps, diffusion.shows_steps) == (4, 50, True)
    assert (tokens.steps, tokens.most_steps, tokens.shows_steps) == (None, None, False)
    assert diffusion.sampling["upsampler_16"]["noise_level"] == 5
    assert diffusion.reads_prompts
    assert (diffusion.prompts, tokens.prompts) == (("red apple", "red flag"), ())
    assert (diffusion.tasks, tokens.tasks) == (("inpainting", "uncropping"), ())
    assert "size" in tokens.options


def test_a_generator_is_warmed_by_few_steps_of_every_stage(folder):
    cascade = Cascade.load(folder)
    request = quick(cascade, cascade.makers["diffusion"].example())
    assert request.sampling == (("base", "num_inference_steps", 2), ("upsampler_16", "num_inference_steps", 2))
    steps: list[str] = []
    cascade.sample([request], on_step=lambda stage, *rest: steps.append(stage))
    assert steps == ["base"] * 2 + ["upsampler_16"] * 2
