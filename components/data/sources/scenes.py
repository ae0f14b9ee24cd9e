"""Procedural scenes: colored solids on a floor, with caption, class, exact depth map and mask.

Ray casting with closed-form intersections, so depth is exact at pixel centers. Image i is a function of i alone.
Shapes: S = 3 x resolution samples a side, P = S^2 rays. Units: the camera is at the origin, one unit up from the floor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from einops import rearrange, reduce
from PIL import Image

from components.data.sources.source import Drawing, Item, Source
from components.sampling.image_files import encode_png

GENERATOR_VERSION = 1
SHAPES = ("sphere", "cube", "cylinder")
COLORS = {
    **{"red": (214, 40, 40), "green": (46, 160, 67), "blue": (45, 90, 220), "yellow": (240, 196, 25)},
    **{"purple": (140, 60, 190), "orange": (243, 124, 32), "white": (244, 244, 244), "black": (35, 35, 40)},
}
SUPERSAMPLING = 3  # rays a pixel and axis; odd, so that one of them is the pixel's center
DEPTH_UNIT = 1000  # depth.png holds thousandths of a unit along the viewing axis
FLOOR, WALL = -1.0, 9.0
HALF_SIDE = 0.42
COS, SIN = np.cos(np.pi / 6), np.sin(np.pi / 6)
TURN = np.array([[COS, 0, -SIN], [0, 1, 0], [SIN, 0, COS]])  # cubes stand turned by 30 degrees, to show two sides
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


def list_scenes(count: int) -> Source:
    """Lists the first `count` scenes; the class of a scene is the first solid's shape."""
    numbered = ((number, scene(number)) for number in range(count))
    items = (Item(f"scene-{n:07d}", SHAPES.index(solids[0].shape), caption(solids), str(n)) for n, solids in numbered)
    return Source("scenes", "CC0-1.0", SHAPES, tuple(items), SceneReader())


def scene(number: int) -> list[Solid]:
    """A single solid, or two without contact, as a function of the scene's number."""
    draws = np.random.Philox(np.random.SeedSequence((GENERATOR_VERSION, number))).random_raw(12) / 2**64
    shape, other_shape = (SHAPES[int(draws[place] * len(SHAPES))] for place in (0, 2))
    color, other_color = (list(COLORS)[int(draws[place] * len(COLORS))] for place in (1, 3))
    if draws[4] < 0.5:
        size = 0.45 + 0.5 * draws[5]
        return [Solid(shape, color, 1.2 * draws[6] - 0.6, 3.4 + draws[7], size)]
    side = 1 if draws[8] < 0.5 else -1
    first = Solid(shape, color, -side * (0.65 + 0.2 * draws[6]), 3.4 + draws[7], 0.35 + 0.2 * draws[5])
    second = Solid(other_shape, other_color, side * (0.65 + 0.2 * draws[9]), 3.4 + draws[10], 0.35 + 0.2 * draws[11])
    return [first, second]


def caption(solids: list[Solid]) -> str:
    """Describes a scene, by words that its image decides."""
    first = solids[0]
    if len(solids) == 1:
        return f"a {'large' if first.size > 0.7 else 'small'} {first.color} {first.shape}"
    side = "left" if first.x < solids[1].x else "right"
    return f"a {first.color} {first.shape} to the {side} of a {solids[1].color} {solids[1].shape}"


def render(solids: list[Solid], *, resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws solids in front of the background.
    Returns color uint8 (H, W, 3), depth float64 (H, W) in units, and mask uint8 (H, W): 0 background, i solid i."""
    samples = resolution * SUPERSAMPLING
    across = HALF_SIDE * (2 * (np.arange(samples) + 0.5) / samples - 1)  # half a side is HALF_SIDE at depth 1
    x, y = np.meshgrid(across, -across - 0.1)  # slightly down
    rays = np.stack([x.ravel(), y.ravel(), np.ones(samples**2)], axis=1)  # (P, 3): distance along a ray is depth
    floor = FLOOR / np.minimum(rays[:, 1], -1e-9)
    depth, mask = np.minimum(floor, WALL), np.zeros(len(rays), np.uint8)  # of floor and back wall, (P,)
    on_floor = (floor < WALL)[:, None]
    color = np.where(on_floor, np.array([206.0, 200.0, 190.0]), np.array([176.0, 205.0, 228.0]))  # (P, 3)
    for number, solid in enumerate(solids, start=1):
        distance, normal = _intersect(solid, rays)
        hit = distance < depth
        shade = 0.35 + 0.65 * np.clip(normal @ LIGHT, 0, 1)
        color[hit] = shade[hit, None] * np.array(COLORS[solid.color])
        depth[hit], mask[hit] = distance[hit], number
    grid = {"h": resolution, "a": SUPERSAMPLING, "b": SUPERSAMPLING}
    center = SUPERSAMPLING // 2
    pixels = reduce(color, "(h a w b) c -> h w c", "mean", **grid)
    depth = rearrange(depth, "(h a w b) -> h a w b", **grid)[:, center, :, center]
    mask = rearrange(mask, "(h a w b) -> h a w b", **grid)[:, center, :, center]
    return np.rint(pixels).astype(np.uint8), depth, np.ascontiguousarray(mask)


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
