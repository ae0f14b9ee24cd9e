"""Images beside the training images nearest to them: a copy is found, and what is new is as far as held-out images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from components.evaluation import features as evaluated
from components.evaluation.features import draw_nearest
from components.evaluation.grids import GridBlock
from components.evaluation.image_sets import MadeStage, images_at
from components.evaluation.metrics import nearest_images

NUMBERS = np.random.default_rng(0)
TRAINED, HELD_OUT, NEW = (NUMBERS.standard_normal((count, 8)).astype(np.float32) for count in (300, 100, 50))
PIXELS = NUMBERS.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)


class Part(NamedTuple):
    """Images in memory, in batches as a shard has them."""

    images: np.ndarray
    place: Any = None

    @property
    def num_images(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[np.ndarray]:
        assert len(self.images), "a part without any is not read"
        yield from (self.images[start : start + 32] for start in range(0, len(self.images), 32))


class Features(NamedTuple):
    """Features in memory."""

    values: np.ndarray

    def read(self) -> dict[str, np.ndarray]:
        return {"features": self.values}


def test_the_nearest_reference_is_that_of_all_pairs() -> None:
    numbers, distances = nearest_images(NEW, TRAINED)
    pairs = np.linalg.norm(NEW[:, None].astype(np.float64) - TRAINED, axis=-1)
    np.testing.assert_array_equal(numbers, pairs.argmin(axis=1))
    np.testing.assert_allclose(distances, pairs.min(axis=1))
    assert nearest_images(TRAINED, TRAINED)[1].max() == 0


def test_images_are_found_by_their_number_over_all_parts_in_the_order_asked_for() -> None:
    parts = [Part(PIXELS[:70]), Part(PIXELS[70:71]), Part(PIXELS[71:])]
    for number, image in zip((299, 0, 70, 33), images_at(parts, [299, 0, 70, 33]), strict=True):
        np.testing.assert_array_equal(image, PIXELS[number])


@pytest.mark.parametrize("copied", [True, False])
def test_copies_are_nearer_than_held_out_images_and_stand_above_their_originals(
    copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluated, "some_of", lambda parts, chosen: [Part(PIXELS[chosen])])
    drawn: list[GridBlock] = []
    monkeypatch.setattr(evaluated, "render_blocks", lambda blocks, columns: drawn.extend(blocks) or b"drawn")
    features, images = (TRAINED[100:150], PIXELS[100:150]) if copied else (NEW, PIXELS[:50])
    made = MadeStage("diffusion", "base", 16, (Part(images),))
    sets: Any = (Features(features), Features(TRAINED), Features(HELD_OUT))
    png, near = draw_nearest(made, [], *sets)
    assert near["held_out_median"] > 1
    assert (near["median"] == 0, near["share_nearer"] == 1) == (copied, copied)
    assert copied or near["share_nearer"] < 0.2
    assert png == b"drawn"
    above, below = (block.images for block in drawn)
    assert len(above) == len(below) == len(drawn[1].captions) == 8
    assert all((one == other).all() == copied for one, other in zip(above, below, strict=True))
