"""Images for the report: requests, sampling jobs, and grids of the sampled images.

Names are a contract with the report: `GENERATOR_by_class`, `GENERATOR_by_prompt`, `GENERATOR_by_condition` (each
condition image before what was made of it), `GENERATOR_unconditional`, `strip_STAGE`, `cascade_side_by_side`,
`originals_and_reconstructions`, `index_grids`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.generated import SampledImages, SampleJob, accepts, jobs_of, joined, read_job
from components.evaluation.grids import GridBlock, labelled_grid, readable, render_blocks
from components.runtime.pool import file_name
from components.runtime.storage.store import Store
from components.sampling.cascade import GENERATORS, Cascade
from components.sampling.images import read_image, to_uint8
from components.sampling.requests import Request

STRIP = "strip"
ORIGINALS = "originals_and_reconstructions"
INDEX_GRIDS = "index_grids"
SIDE_BY_SIDE = "cascade_side_by_side"
COMPARED = 6  # number of conditions with the cascade's stages side by side
SEED_APART = 1_000_000  # shown images have other seeds than measured ones
RECONSTRUCTIONS = 24
GRIDS = 8  # images in a row of reconstructions, and index grids shown
UNCONDITIONAL = 32  # number of shown images of a model without conditions


class GalleryConfig(Config):
    """Number of shown images for each class and prompt, frames of strips, and guidance of shown images."""

    images_per_class: int = Field(6, ge=1)
    max_classes: int = Field(12, ge=1)
    prompts: tuple[str, ...] = ()  # empty: the captions of the first held-out images
    num_prompts: int = Field(8, ge=0)  # number of captions taken in place of prompts
    images_per_prompt: int = Field(6, ge=1)
    strip_frames: int = Field(8, ge=2)
    guidance_scale: float | None = Field(None, ge=0)  # of shown images; None is the model's own


def gallery_requests(
    config: GalleryConfig,
    cascade: Cascade,
    *,
    captions: Sequence[str],
    images: Sequence[bytes] = (),
    seed: int,
) -> dict[str, list[Request]]:
    """Image name -> requests, as far as the models of the generator take such conditions.

    Args:
        captions: prompts to choose from, where the configuration names none.
        images: condition images (PNG), for a cascade that takes one.
    """
    shown = {}
    for generator in cascade.generators:
        bare, classes = Request(generator=generator, guidance_scale=config.guidance_scale), cascade.classes(generator)
        plain, once = Request(generator=generator), list(dict.fromkeys(filter(None, captions)))
        fitting = [caption for caption in once if accepts(cascade, plain.replace(prompt=caption))]
        prompts = config.prompts or fitting[: config.num_prompts]
        asked = {
            "class": [bare.replace(label=label) for label in range(len(classes))[: config.max_classes]],
            "prompt": [bare.replace(prompt=prompt) for prompt in prompts],
            "condition": [bare.replace(condition=image) for image in images],
        }
        if not any(asked.values()):
            asked = {"unconditional": [bare]}
        each = {"class": config.images_per_class, "unconditional": UNCONDITIONAL}
        for kind, requests in asked.items():  # the same seeds for all requests of a kind
            seeds = range(seed + SEED_APART, seed + SEED_APART + each.get(kind, config.images_per_prompt))
            every = [request.replace(seed=number) for request in requests for number in seeds]
            if accepted := [request for request in every if accepts(cascade, request)]:
                shown[f"{generator}_{'' if kind == 'unconditional' else 'by_'}{kind}"] = accepted
    return shown


def gallery_jobs(requests: Mapping[str, Sequence[Request]], *, strip_frames: int) -> list[SampleJob]:
    """Jobs of all shown images, and of a single denoising strip."""
    jobs = [job for name, asked in requests.items() for job in jobs_of(name, asked)]
    denoised = denoised_request(requests)
    return jobs + [SampleJob(STRIP, denoised, frames=strip_frames)] * bool(denoised)


def denoised_request(requests: Mapping[str, Sequence[Request]]) -> tuple[Request, ...]:
    """The request to show as a denoising strip; empty if no generator of the requests denoises."""
    shown = [asked[0] for asked in requests.values() if asked and GENERATORS[asked[0].generator or ""].shows_steps]
    return tuple(shown[-1:])


def draw_gallery(
    requests: Mapping[str, Sequence[Request]], files: Store, *, classes: Sequence[str]
) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Grids (PNG) of the jobs' images by name, each with the conditions of its rows or columns.
    Runs in a worker."""
    drawn: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    for name, asked in requests.items():
        if not asked:
            continue
        images = joined([read_job(job.name, files) for job in jobs_of(name, asked)])
        labels, words = [condition_name(request, classes) for request in asked], words_of(asked, classes)
        if asked[0].condition is not None:
            drawn[name] = condition_grid(asked, images.finished), words
            continue
        drawn[name] = labelled_grid(list(images.finished), labels), words
        if len(images.stages) > 1 and SIDE_BY_SIDE not in drawn:
            drawn[SIDE_BY_SIDE] = side_by_side(images, labels), words[:COMPARED]
    if files.exists(file_name(STRIP)):
        words = words_of(denoised_request(requests), classes)
        for stage, strip in read_job(STRIP, files).strips.items():
            captions = [f"t = {timestep:.4g}" for timestep in strip.timesteps]
            noisy = GridBlock("x_t, what the model is given", list(strip.x_t[:, 0]))
            clean = GridBlock("x_0, what it predicts", list(strip.x_0[:, 0]), captions)
            drawn[f"strip_{stage}"] = render_blocks([noisy, clean], columns=len(captions)), words
    return drawn


def condition_name(request: Request, classes: Sequence[str]) -> str:
    """Condition of an image in words: prompt, class name, or "no condition"."""
    if request.prompt is not None:
        return request.prompt
    if isinstance(request.label, int):
        return readable(classes[request.label] if request.label < len(classes) else str(request.label))
    return "no condition"


def words_of(requests: Sequence[Request], classes: Sequence[str]) -> tuple[str, ...]:
    """Requested classes and prompts in words, each once."""
    asked = [request for request in requests if request.prompt is not None or request.label is not None]
    return tuple(dict.fromkeys(condition_name(request, classes) for request in asked))


def condition_grid(requests: Sequence[Request], finished: np.ndarray) -> bytes:
    """Grid with a row for each condition image: the condition, then the images made for the condition."""
    rows: dict[bytes, list[np.ndarray]] = {}
    for request, image in zip(requests, finished, strict=True):
        png = request.condition or b""
        rows.setdefault(png, [to_uint8(read_image(png, resolution=len(image))[None])[0]]).append(image)
    labels = [f"condition {number}, and images made of it" for number, row in enumerate(rows.values()) for _ in row]
    return labelled_grid([image for row in rows.values() for image in row], labels)


def side_by_side(made: SampledImages, labels: Sequence[str]) -> bytes:
    """Grid of all stages of the generator: a row for each stage, and a column for each condition."""
    columns = [labels.index(label) for label in dict.fromkeys(labels)][:COMPARED]
    blocks = [
        GridBlock(f"{readable(stage)}, {images.shape[1]} pixels", [images[column] for column in columns])
        for stage, images in made.stages.items()
    ]
    captions = [labels[column] for column in columns]
    return render_blocks([*blocks[:-1], blocks[-1]._replace(captions=captions)], columns=len(columns))


def draw_index_grids(originals: np.ndarray, grids: np.ndarray, reconstructions: np.ndarray) -> bytes:
    """Grid of originals (N, H, W, 3), index grids in colors (N, h, w, 3), and reconstructions.
    Shows the first images, each original above its index grid and its reconstruction."""
    height, width = grids.shape[1:3]
    rows = {"original": originals, f"index grid, {height} x {width} codes": grids, "reconstruction": reconstructions}
    blocks = [GridBlock(name, list(row[:GRIDS])) for name, row in rows.items()]
    return render_blocks(blocks, columns=min(GRIDS, len(grids)))


def draw_reconstructions(originals: np.ndarray, reconstructions: np.ndarray) -> bytes:
    """Rows of the first originals (N, H, W, 3), each row with the reconstructions right below."""
    shown = {"original": originals[:RECONSTRUCTIONS], "reconstruction": reconstructions[:RECONSTRUCTIONS]}
    starts = range(0, min(RECONSTRUCTIONS, len(originals)), GRIDS)
    blocks = [GridBlock(name, list(rows[start : start + GRIDS])) for start in starts for name, rows in shown.items()]
    return render_blocks(blocks, columns=min(GRIDS, len(originals)))
