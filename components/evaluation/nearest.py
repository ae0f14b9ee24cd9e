"""Images made beside the nearest training images: whether a model copies.

Nearest in the features of the distances. Held-out images say how near an image lies that was never trained on: a copy
is much nearer. Shapes: N images, R training images, D features.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np

from components.evaluation.features import FEATURES, FeatureSet
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import BATCH, ImagePart, MadeStage, ShardImages, some_of
from components.evaluation.metrics import nearest_images

COLUMNS = 8  # images shown
QUANTILE = 0.05  # of held-out images, near by chance


def draw_nearest(
    made: MadeStage, trained: Sequence[ShardImages], features: FeatureSet, reference: FeatureSet, held_out: FeatureSet
) -> tuple[bytes, dict[str, float]]:
    """Grid (PNG) of the images made nearest to training images, and figures of all N images.

    Below each stands its training image, with their distance. The figures are medians of distances to the nearest
    training image, of images made and held out, and the share of images made that are nearer than all but 5 % of
    held-out images. Runs in a worker."""
    references = reference.read()[FEATURES]
    rows, distances = nearest_images(features.read()[FEATURES], references)
    apart = nearest_images(held_out.read()[FEATURES], references)[1]
    closest = np.argsort(distances, kind="stable")[:COLUMNS]
    chosen, places = np.unique(rows[closest], return_inverse=True)
    copies = images_at(made.parts, closest.tolist())
    originals = images_at(some_of(trained, chosen), places.tolist())  # read in the order of the set
    captions = [f"{distance:.1f}" for distance in distances[closest]]
    blocks = [GridBlock("made", copies), GridBlock("nearest training images, and distance", originals, captions)]
    near = {"median": float(np.median(distances)), "held_out_median": float(np.median(apart))}
    near["share_nearer"] = float((distances < np.quantile(apart, QUANTILE)).mean())
    return render_blocks(blocks, columns=len(closest)), near


def images_at(parts: Sequence[ImagePart], numbers: Sequence[int]) -> list[np.ndarray]:
    """The images (H, W, 3) with the given numbers, counted over all parts; parts without any are not read."""
    first, found = 0, dict[int, np.ndarray]()
    for part in parts:
        inside = {number for number in numbers if first <= number < first + part.num_images}
        for start, images in zip(count(first, BATCH), part.batches() if inside else (), strict=False):
            found |= {number: images[number - start] for number in inside if start <= number < start + len(images)}
        first += part.num_images
    return [found[number] for number in numbers]
