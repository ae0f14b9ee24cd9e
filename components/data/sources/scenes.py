"""Procedural scenes: colored solids on a floor, with caption, class, exact depth map and mask.

Ray casting with closed-form intersections, so depth is exact at pixel centers. Image i is a function of i alone.
Captions name what an image decides: sizes leave a gap, and solids of a pair stand on their sides. Pairs of a color and
a shape can be kept out of training, so that a model is asked for what it has never seen.
Shapes: S = 3 x resolution samples a side, P = S^2 rays. Units: the camera is at the origin, one unit up from the floor.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from components.data.listing import SourceError
from components.data.shards import split_of
from components.data.sources.source import Drawing, Item, Source
from components.sampling.image_files import encode_png

GENERATOR_VERSION = 2
OWN_NUMBERS = 10_000_000  # sets have smaller numbers; judges learn from larger ones
SHAPES = ("sphere", "cube", "cylinder")
COLORS = {
    **{"red": (214, 40, 40), "green": (46, 160, 67), "blue": (45, 90, 220), "yellow": (240, 196, 25)},
    **{"purple": (140, 60, 190), "orange": (243, 124, 32), "white": (244, 244, 244), "black": (35, 35, 40)},
}
SUPERSAMPLING = 3  # rays a pixel and axis; odd, so that one of them is the pixel's center
DEPTH_UNIT = 1000  # depth.png holds thousandths of a unit along the viewing axis
FLOOR, WALL = -1.0, 9.0
HALF_SIDE = 0.42
SMALL, LARGE = 0.4, 0.72  # least half heights of single solids, each up to 0.14 more
COS, SIN = np.cos(np.pi / 6), np.sin(np.pi / 6)
TURN = np.array([[COS, 0, -SIN], [0, 1, 0], [SIN, 0, COS]])  # by 30 degrees, to show two sides
LIGHT = np.array([-0.45, 0.8, -0.4]) / np.linalg.norm([-0.45, 0.8, -0.4])


class Solid(NamedTuple):
    """A solid that stands on the floor."""

    shape: str
    color: str
    x: float  # of the center
    z: float
    size: float  # half the height


@dataclass(frozen=True)
class SceneReader:
    """Draws scene number `item.location`."""

    def read(self, item: Item) -> bytes:
        return b""

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        solids = scene(int(item.location))
        color, depth, mask = render(solids, resolution=resolution)
        depth_file = encode_png(np.rint(depth * DEPTH_UNIT).astype(np.uint16))
        details: dict[str, object] = {"solids": [solid._asdict() for solid in solids]}
        return Drawing(Image.fromarray(color), {"depth.png": depth_file, "mask.png": encode_png(mask)}, details)


def list_scenes(count: int, *, held_out_pairs: int = 0, holdout_fraction: float = 0.0) -> Source:
    """Lists `count` scenes in the order of their numbers; the class of a scene is the first solid's shape.
    Scenes with a held-out pair stay in the split that training never sees: of the others' keys they are left out.
    Raises SourceError for more scenes than sets may have."""
    if count >= OWN_NUMBERS:
        raise SourceError(f"limit {count:,} must be below {OWN_NUMBERS:,}: a judge learns from the scenes after those")
    pairs, items, number = draw_pairs(held_out_pairs), list[Item](), 0
    while len(items) < count:
        solids, key = scene(number), f"scene-{number:07d}"
        kept_out = any(pair_of(solid) in pairs for solid in solids)
        if not kept_out or split_of(key, holdout_fraction) == "holdout":
            items.append(Item(key, SHAPES.index(solids[0].shape), caption(solids), str(number)))
        number += 1
    return Source("scenes", "CC0-1.0", SHAPES, tuple(items), SceneReader(), held_out_pairs=pairs)


def draw_pairs(count: int) -> tuple[str, ...]:
    """Pairs to hold out, as `red cube`: `count` colors, each with one shape.
    Drawn by a seed of the generator, before anything is trained. Every color keeps two shapes and every shape
    other colors, so that each word is still learned."""
    draws = np.random.Philox(np.random.SeedSequence((GENERATOR_VERSION, OWN_NUMBERS))).random_raw(2 * len(COLORS))
    colors = np.argsort(draws[: len(COLORS)], kind="stable")[:count]
    first = int(draws[-1] % len(SHAPES))
    return tuple(f"{list(COLORS)[color]} {SHAPES[(first + n) % len(SHAPES)]}" for n, color in enumerate(colors))


def pair_of(solid: Solid) -> str:
    """Color and shape of a solid, in words."""
    return f"{solid.color} {solid.shape}"


def scene(number: int) -> list[Solid]:
    """A single solid, or two without contact, as a function of the scene's number."""
    draws = np.random.Philox(np.random.SeedSequence((GENERATOR_VERSION, number))).random_raw(12) / 2**64
    shape, other_shape = (SHAPES[int(draws[place] * len(SHAPES))] for place in (0, 2))
    color, other_color = (list(COLORS)[int(draws[place] * len(COLORS))] for place in (1, 3))
    if draws[4] < 0.5:
        smallest = LARGE if draws[8] < 0.5 else SMALL
        return [Solid(shape, color, 0.8 * draws[6] - 0.4, 3.6 + 0.6 * draws[7], smallest + 0.14 * draws[5])]
    side = 1 if draws[8] < 0.5 else -1
    first = Solid(shape, color, -side * (0.73 + 0.12 * draws[6]), 3.9 + 0.5 * draws[7], 0.45 + 0.12 * draws[5])
    places = (side * (0.73 + 0.12 * draws[9]), 3.9 + 0.5 * draws[10], 0.45 + 0.12 * draws[11])
    return [first, Solid(other_shape, other_color, *places)]


def caption(solids: list[Solid]) -> str:
    """Describes a scene, by words that its image decides."""
    first = solids[0]
    if len(solids) == 1:
        return f"a {'large' if first.size >= LARGE else 'small'} {pair_of(first)}"
    side = "left" if first.x < solids[1].x else "right"
    one, other = (f"a{'n' * (solid.color[0] in 'aeiou')} {pair_of(solid)}" for solid in solids)
    return f"{one} to the {side} of {other}"


def render(solids: list[Solid], *, resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws solids in front of the background.
    Returns color uint8 (H, W, 3), depth float64 (H, W) in units, and mask uint8 (H, W): 0 background, i solid i."""
    rays, squares, depth, color = _background(resolution)
    depth, color = depth.copy(), color.copy()
    mask = np.zeros(len(rays), np.uint8)
    for number, solid in enumerate(solids, start=1):
        place = np.array([solid.x, FLOOR + solid.size, solid.z])
        # rays that meet the ball around it, a fifth
        near = np.flatnonzero((rays @ place) ** 2 >= squares * (place @ place - 3 * solid.size**2))
        distance, normal = _intersect(solid, rays[near])
        hit = distance < depth[near]
        shade = 0.35 + 0.65 * np.clip(normal[hit] @ LIGHT, 0, 1)
        color[near[hit]] = shade[:, None] * np.array(COLORS[solid.color])
        depth[near[hit]], mask[near[hit]] = distance[hit], number
    every, sides = SUPERSAMPLING, 2 * (resolution * SUPERSAMPLING,)
    center = slice(every // 2, None, every)
    depth, mask = (part.reshape(sides)[center, center] for part in (depth, mask))
    color = color.reshape(*sides, 3)
    total = sum(color[y::every, x::every] for y, x in np.ndindex(every, every))  # faster than a mean over axes
    return np.rint(total / every**2).astype(np.uint8), depth, np.ascontiguousarray(mask)


@lru_cache(maxsize=4)
def _background(resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rays (P, 3), whose distance is depth, with squares (P,), and depth (P,) and color (P, 3) behind."""
    samples = resolution * SUPERSAMPLING
    across = HALF_SIDE * (2 * (np.arange(samples) + 0.5) / samples - 1)  # half a side is HALF_SIDE at depth 1
    x, y = np.meshgrid(across, -across - 0.1)  # slightly down
    rays = np.stack([x.ravel(), y.ravel(), np.ones(samples**2)], axis=1)
    floor = FLOOR / np.minimum(rays[:, 1], -1e-9)
    color = np.where((floor < WALL)[:, None], np.array([206.0, 200.0, 190.0]), np.array([176.0, 205.0, 228.0]))
    return rays, (rays**2).sum(1), np.minimum(floor, WALL), color


def _intersect(solid: Solid, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth of the first hit (P,), infinite without a hit, and the normal there (P, 3)."""
    center = np.array([solid.x, FLOOR + solid.size, solid.z])
    if solid.shape != "sphere":
        return (_box if solid.shape == "cube" else _cylinder)(center, solid.size, rays)
    distance = _quadratic((rays**2).sum(1), -2 * rays @ center, float(center @ center - solid.size**2))
    return distance, (_points(rays, distance) - center) / solid.size


def _box(center: np.ndarray, half: float, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slab method in the cube's own frame."""
    turned = rays @ TURN.T
    center = TURN @ center
    safe = np.where(np.abs(turned) < 1e-9, 1e-9, turned)
    low, high = (center - half) / safe, (center + half) / safe
    entry, leave = np.minimum(low, high), np.maximum(low, high)  # (P, 3)
    axis, near = entry.argmax(1), entry.max(1)
    distance = np.where(near < leave.min(1), near, np.inf)
    return distance, (-np.eye(3)[axis] * np.sign(np.take_along_axis(safe, axis[:, None], 1))) @ TURN


def _cylinder(center: np.ndarray, half: float, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersects an upright cylinder, closed above, with 0.7 of half the height as radius."""
    radius, flat, place = 0.7 * half, rays[:, [0, 2]], center[[0, 2]]
    side = _quadratic((flat**2).sum(1), -2 * flat @ place, float(place @ place - radius**2))
    point = _points(rays, side)
    side = np.where(np.abs(point[:, 1] - center[1]) <= half, side, np.inf)
    top = (center[1] + half) / np.where(np.abs(rays[:, 1]) < 1e-9, 1e-9, rays[:, 1])
    inside = ((top[:, None] * flat - place) ** 2).sum(1) <= radius**2
    top = np.where(inside & (top > 0), top, np.inf)
    outward = (point - center) * np.array([1, 0, 1]) / radius
    return np.minimum(side, top), np.where((top < side)[:, None], np.array([0.0, 1.0, 0.0]), outward)


def _quadratic(a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
    """Smaller root of a t^2 + b t + c, infinite without a real root."""
    inside = b**2 - 4 * a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / (2 * a), np.inf)


def _points(rays: np.ndarray, distance: np.ndarray) -> np.ndarray:
    return rays * np.where(np.isfinite(distance), distance, 0)[:, None]
