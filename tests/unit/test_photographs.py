"""Laws of the photographs: named with author and license, cut alike for ever, held out whole, refused where missing."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.data.ingest import open_source
from components.data.listing import SourceError
from components.data.shards import split_of
from components.data.source_check import check_file, detect_source, file_to_try, source_digest
from components.data.sources import photographs
from components.data.sources.photographs import CHOICES, PATCHES, SPAN, contrast, drawn_squares, list_photographs, table
from tests.in_process import in_process
from tests.photographs import HEIGHT, write_photographs
from tests.refusals import assert_refused, one_line

FREE = {"CC0-1.0", "CC BY 4.0", "CC BY-SA 4.0", "GPL-2+", "LGPL-3.0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("share"))


def test_every_photograph_is_named_with_its_package_author_and_a_free_license(folder: Path) -> None:
    assert all(all(photograph) for photograph in table())
    assert len({photograph.file for photograph in table()}) == len({p.title for p in table()}) == len(table()) >= 24
    assert {photograph.license for photograph in table()} <= FREE
    source = list_photographs(str(folder))
    assert source.license.endswith(f": {len(table())} photographs")
    assert all(photograph.license in source.license for photograph in table())
    item = source.items[-1]
    details = source.reader.draw(item, source.reader.read(item), resolution=8).details
    assert table()[-1]._asdict().items() <= details.items()
    json.dumps(details)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3])
def test_photographs_are_held_out_whole_and_each_has_as_many_patches(folder: Path, share: float) -> None:
    splits: dict[str, list[str]] = defaultdict(list)
    items = open_source("photographs", str(folder), holdout_fraction=share).items
    for item in items:
        splits[item.location].append(split_of(item.key, share))
    assert len({item.key for item in items}) == len(items)
    assert [len(each) for each in splits.values()] == [PATCHES] * len(table())
    assert all(len(set(each)) == 1 for each in splits.values())
    assert sum("holdout" in each for each in splits.values()) == round(share * len(table()))


def test_patches_are_the_same_for_ever_and_each_is_another_part_of_its_own_photograph(folder: Path) -> None:
    one, other = (list_photographs(str(folder), holdout_fraction=0.1) for _ in range(2))
    assert one == other
    drawn = []
    for number in range(3):
        item = one.items[5 * PATCHES + number]
        first, second = (np.asarray(each.reader.draw(item, b"", resolution=16).image) for each in (one, other))
        np.testing.assert_array_equal(first, second)
        colored = first[first.min(axis=2) < 64].astype(float)
        hue = colored.sum(0) / colored.sum()
        whole = np.asarray(Image.open(folder / table()[5].file).convert("RGB"))[HEIGHT // 2 + 8 :].sum((0, 1))
        np.testing.assert_allclose(hue, whole / whole.sum(), atol=0.05)
        drawn.append(first.tobytes())
    assert len(set(drawn)) == 3
    assert drawn_squares("storm-0001", (320, 180)) == drawn_squares("storm-0001", (320, 180))


def test_squares_are_one_or_two_patches_wide_and_lie_inside() -> None:
    for number in range(200):
        for left, top, right, bottom in drawn_squares(f"any-{number}", (320, 180)):
            assert 180 / SPAN - 1 <= right - left == bottom - top <= 180 * 2 / SPAN
            assert 0 <= left < right <= 320
            assert 0 <= top < bottom <= 180


def test_a_patch_is_the_drawn_square_of_the_greatest_contrast_so_that_few_show_flat_sky(folder: Path) -> None:
    source, flat = list_photographs(str(folder)), {"patches": 0, "squares": 0}
    for item in source.items[:PATCHES]:
        patch = source.reader.draw(item, b"", resolution=16).image
        image = photographs.shrunk(f"{folder}/{table()[0].file}", SPAN * 16)
        contrasts = [contrast(image.crop(square)) for square in drawn_squares(item.key, image.size)]
        assert np.isclose(contrast(patch), max(contrasts), atol=12)
        flat["patches"] += contrast(patch) < 2
        flat["squares"] += sum(value < 2 for value in contrasts)
    assert flat["squares"] / CHOICES > 0.25 * PATCHES  # half of the photograph is white
    assert flat["patches"] < 0.1 * PATCHES


def test_shrinking_never_aliases(tmp_path: Path) -> None:
    checkers = (255 * (np.indices((720, 1280)).sum(0) % 2)).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "checkers.png")
    gray = np.asarray(photographs.shrunk(str(tmp_path / "checkers.png"), 64))
    assert gray.shape == (64, 114, 3)
    assert np.abs(gray[4:-4, 4:-4].astype(int) - 128).max() < 16


def test_without_the_packages_one_line_names_the_command_that_installs_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "INSTALLED", str(tmp_path / "nothing"))
    packages = " ".join(dict.fromkeys(photograph.package for photograph in table()))
    with one_line(SourceError, f"apt-get install {packages}"):
        detect_source("photographs")
    trained = ["run", "--recipe", "palette", "--set", "images.source=photographs", "--tracking", "none"]
    for command in (["data", "photographs", "--out", "set"], trained):
        assert_refused(in_process(*command, cwd=tmp_path), "photographs are not here", "apt-get install")
    assert list(tmp_path.rglob("*.tar")) == []
    monkeypatch.setattr(photographs, "INSTALLED", str(folder))
    assert detect_source("photographs") == ("photographs", str(folder))


def test_the_digest_is_of_the_photographs_and_of_the_choice_of_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photographs(tmp_path)
    before = source_digest("photographs", str(folder))
    (folder / "other.jpg").write_bytes(b"something else")
    assert source_digest("photographs", str(folder)) == before
    file = file_to_try("photographs", str(folder))
    assert file is not None
    check_file(file)
    with monkeypatch.context() as patched:
        patched.setattr(photographs, "VERSION", photographs.VERSION + 1)
        assert source_digest("photographs", str(folder)) != before
    (folder / table()[-1].file).write_bytes(b"another")
    assert source_digest("photographs", str(folder)) != before
    (folder / table()[-1].file).unlink()
    with one_line(SourceError, rf"1 of {len(table())} are missing .*apt-get install {table()[-1].package},"):
        source_digest("photographs", str(folder))
