"""Laws of the study of codes: what is a function of the code is read whole, what is independent of it by chance."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from components.data.shards import ShardIndex
from components.evaluation.codes_study import (
    ASKED,
    PATCHES,
    RIDGE,
    SHOWN,
    TABLE,
    CodedImages,
    CodesStudy,
    CodesStudyConfig,
    counted_words,
    cut_patch,
    drawn_patches,
    explained_color,
    linear_probe,
)
from components.runtime.storage.store import Store
from tests.image_sets import write_set
from tests.tiny_cascade import commit_model, write_models

NUMBERS = np.random.default_rng(0)
PALETTE = NUMBERS.random((8, 3)).astype(np.float32)


def painted(count: int, *, noise: float = 0.0) -> CodedImages:
    """Images of 16² in 4² cells, each with the color of its code."""
    codes = NUMBERS.integers(0, 8, (count, 4, 4))
    colors = PALETTE[codes] + noise * NUMBERS.standard_normal((count, 4, 4, 3)).astype(np.float32)
    images = (255 * colors.clip(0, 1)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return CodedImages(images, np.zeros(count, np.int64), codes, colors)


def test_codes_that_are_colors_explain_all_and_noise_takes_its_share():
    known, asked = painted(400), painted(400)
    assert explained_color(known, asked, codes=8) == pytest.approx(1, abs=1e-9)
    spread = float(PALETTE.astype(np.float64)[asked.codes].reshape(-1, 3).var(axis=0).sum())
    rest = 3 * 0.2**2
    noisy = explained_color(painted(400, noise=0.2), painted(400, noise=0.2), codes=8)
    assert noisy == pytest.approx(spread / (spread + rest), abs=0.02)


def test_codes_without_a_tie_to_colors_explain_nothing():
    known, asked = painted(400), painted(400)
    shuffled = known._replace(codes=NUMBERS.integers(0, 8, known.codes.shape))
    assert explained_color(shuffled, asked, codes=8) == pytest.approx(0, abs=0.08)  # 800 patches a mean
    unseen = known._replace(codes=np.zeros_like(known.codes))  # seven codes have the mean color of all
    assert explained_color(unseen, asked, codes=8) == pytest.approx(0, abs=0.01)


def test_the_probe_is_ridge_regression_of_one_hot_classes():
    known, asked = (NUMBERS.random((200, 16)) for _ in range(2))
    labels = known[:, :3].argmax(axis=1)
    penalty = RIDGE * float(np.square(known - known.mean(axis=0)).sum()) / 16
    expected = Ridge(alpha=penalty).fit(known, np.eye(3)[labels]).predict(asked).argmax(axis=1)
    read = linear_probe(torch.from_numpy(known), torch.from_numpy(asked), labels, classes=3)
    np.testing.assert_array_equal(read, expected)
    assert (read == asked[:, :3].argmax(axis=1)).mean() > 0.9


def test_counts_are_of_one_image_and_their_squares_sum_to_one():
    counts = counted_words(np.array([[[0, 0], [1, 3]], [[2, 2], [2, 2]]]), size=5)
    torch.testing.assert_close(counts.square(), torch.tensor([[0.5, 0.25, 0, 0.25, 0], [0, 0, 1, 0, 0]]).double())


def test_colors_are_cut_to_levels():
    colors = np.array([[[[0, 0, 0], [1, 1, 1]], [[0.49, 0.51, 0], [0, 0, 0.5]]]], dtype=np.float32)
    words = CodedImages(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1), np.zeros((1, 2, 2), np.int64), colors).words(2)
    np.testing.assert_array_equal(words, [[[0, 7], [2, 1]]])


def test_a_patch_is_cut_around_a_cell_with_the_code_and_white_stands_beyond_the_edge():
    (image,) = painted(1).images
    has_code = np.zeros((4, 4), bool)
    has_code[0, 3] = True
    patch = cut_patch(image, has_code)
    assert patch.shape == (20, 20, 3)
    np.testing.assert_array_equal(patch[8:, :12], image[:12, 4:])
    assert (patch[:8] == 255).all()
    assert (patch[:, 12:] == 255).all()


def test_rows_of_patches_have_the_color_of_their_code():
    held_out = painted(40)
    drawn = np.asarray(Image.open(io.BytesIO(drawn_patches(held_out)[PATCHES])).convert("RGB"), dtype=np.float64)
    counts = np.bincount(held_out.codes.ravel())
    assert drawn_patches(painted(SHOWN - 1)) == {}, "codes in fewer images are left out"
    cell = 140  # 20 pixels, enlarged seven times
    first = np.argsort(-counts, kind="stable")[0]
    top = 8 + 34  # the gap and a heading
    centers = [drawn[top + cell // 2, 8 + number * (cell + 8) + cell // 2] for number in range(SHOWN)]
    np.testing.assert_allclose(centers, np.tile(255 * PALETTE[first], (SHOWN, 1)), atol=1)
    assert drawn.shape[1] == 8 + SHOWN * (cell + 8)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(Store(str(tmp_path_factory.mktemp("images"))), sizes=(60, 60), resolution=16)


def test_the_study_reads_color_and_class_from_a_trained_codebook(index: ShardIndex, tmp_path: Path):
    model = commit_model(tmp_path, "tokenizer", "k", write_models(tmp_path / "models")["tokenizer"])
    study = CodesStudy(CodesStudyConfig(), index, {"model": model}, Store("memory://codes"), "codes_study")
    plan, work = study.plan(), study.worker()
    for job in plan.jobs:
        work(job)
    found = study.findings(plan, {})
    assert set(found.summary) == {"color_explained", "class_from_codes", "class_from_colors"}
    rows = {row[1]: row for row in found.tables[TABLE]["rows"]}
    assert rows["its code"][2] == pytest.approx(100 * found.summary["color_explained"])
    (_, _, right, error, chance, count) = rows["counts of its codes"]
    assert error == pytest.approx(100 * (right / 100 * (1 - right / 100) / count) ** 0.5)
    assert count == index.samples - index.train_samples == sum(map(study.images_of, plan.groups[ASKED]))
    assert chance == rows["counts of 27 colors of its patches"][4]
    assert 0 <= found.summary["class_from_colors"] <= 1


def test_a_set_without_held_out_images_is_refused(tmp_path: Path):
    index = write_set(Store(str(tmp_path / "images")), sizes=(8,), holdout_fraction=0.0)
    model = commit_model(tmp_path, "tokenizer", "k", write_models(tmp_path / "models")["tokenizer"])
    with pytest.raises(ValueError, match="holds no image out"):
        CodesStudy(CodesStudyConfig(), index, {"model": model}, Store("memory://codes"), "codes_study").plan()


def test_the_probe_of_equal_features_reads_the_most_frequent_class():
    equal = torch.full((6, 4), 0.1, dtype=torch.float64)  # as of a codebook that has collapsed
    for features in (equal, equal.sqrt()):  # whose mean is rounded
        read = linear_probe(features, features, np.array([0, 2, 2, 1, 2, 0]), classes=3)
        np.testing.assert_array_equal(read, [2] * 6)
