"""Images for the report: requests, sampling jobs, and grids of the sampled images.

Names are a contract with the report: `GENERATOR_by_class`, `GENERATOR_by_prompt`, `GENERATOR_by_condition` (each
condition image before what was made of it), `GENERATOR_unconditional`, `strip_STAGE`, `cascade_side_by_side`,
`originals_and_reconstructions`, or `trained_and_reconstructions` where no image is held out, `index_grids`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from components.configuration.config import Config, refuse
from components.evaluation.generated import SampledImages, SampleJob, accepts, jobs_of, read_jobs
from components.evaluation.grids import GridBlock, labelled_grid, readable, render_blocks
from components.runtime.pool import file_name
from components.runtime.storage.store import Store
from components.sampling.cascade import GENERATORS, Cascade
from components.sampling.images import read_image, to_uint8
from components.sampling.requests import Request

STRIP = "strip"
ORIGINALS, TRAINED = "originals_and_reconstructions", "trained_and_reconstructions"  # held out, else of training
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
    # of shown images, by generators that take it; None is the model's own
    guidance_scale: float | None = Field(None, ge=0)


def gallery_requests(
    config: GalleryConfig, cascade: Cascade, *, captions: Sequence[str], images: Sequence[bytes] = (), seed: int
) -> dict[str, list[Request]]:
    """Image name -> requests, at least one, as far as the models of the generator take such conditions.
    `captions`: prompts to choose from, where the configuration names none. `images`: condition images (PNG), for a
    cascade that takes one. Raises ValueError, in one line, for a configured prompt that no generator takes."""
    shown = {}
    for generator in cascade.generators:
        plain, classes = Request(generator=generator), cascade.makers[generator].classes
        bare = plain.replace(guidance_scale=config.guidance_scale)
        once = dict.fromkeys(filter(None, captions))
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
            # guidance where the generator takes any
            own = [each if accepts(cascade, each) else each.replace(guidance_scale=None) for each in requests]
            every = [request.replace(seed=number) for request in own for number in seeds]
            if accepted := [request for request in every if accepts(cascade, request)]:
                shown[f"{generator}_{'' if kind == 'unconditional' else 'by_'}{kind}"] = accepted
    lost = set(config.prompts) - {request.prompt for requests in shown.values() for request in requests}
    refuse(lost, f"samples.prompts: no generator takes {min(lost, default='')!r:.80}; shorten it, or leave it out")
    return shown


def sample_grid(cascade: Cascade, *, count: int) -> bytes:
    """Grid (PNG) of images of each class, or of no condition, by the first generator.
    Raises ValueError, in one line, for a model that makes no image of these alone."""
    classes = cascade.makers[cascade.with_generator(Request()).generator or ""].classes
    config = GalleryConfig(images_per_class=-(-count // (len(classes) or 1)), max_classes=count)
    shown = gallery_requests(config, cascade, captions=(), seed=0)
    asked = next(iter(shown.values()), [])[:count]
    refuse(not asked, "the model makes no images of a class or of nothing: leave the samples out")
    return labelled_grid(cascade.sample(asked), [condition_name(request, classes) for request in asked])


def gallery_jobs(requests: Mapping[str, Sequence[Request]], *, strip_frames: int) -> list[SampleJob]:
    """Jobs of all shown images, and of a single denoising strip."""
    jobs = [job for name, asked in requests.items() for job in jobs_of(name, asked)]
    denoised = denoised_request(requests)
    return jobs + [SampleJob(STRIP, denoised, frames=strip_frames)] * bool(denoised)


def denoised_request(requests: Mapping[str, Sequence[Request]]) -> tuple[Request, ...]:
    """The request to show as a denoising strip; empty if no generator of the requests denoises."""
    shown = [asked[0] for asked in requests.values() if GENERATORS[asked[0].generator or ""].shows_steps]
    return tuple(shown[-1:])


def draw_gallery(
    requests: Mapping[str, Sequence[Request]], files: Store, *, classes: Sequence[str]
) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Grids (PNG) of the jobs' images by name, each with the conditions of its rows or columns.
    Runs in a worker."""
    drawn: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    for name, asked in requests.items():
        images = read_jobs(jobs_of(name, asked), files)
        labels, words = [condition_name(request, classes) for request in asked], words_of(asked, classes)
        if asked[0].condition is not None:
            drawn[name] = condition_grid(asked, images.finished), words
            continue
        drawn[name] = labelled_grid(list(images.finished), labels), words
        if len(images.stages) > 1 and SIDE_BY_SIDE not in drawn:
            drawn[SIDE_BY_SIDE] = side_by_side(images, labels), words[:COMPARED]
    if files.exists(file_name(STRIP)):
        denoised = denoised_request(requests)
        words = words_of(denoised, classes)
        for stage, strip in read_jobs([SampleJob(STRIP, denoised)], files).strips.items():
            captions = [f"t = {timestep:.4g}" for timestep in strip.timesteps]
            noisy = GridBlock("x_t, what the model is given", list(strip.x_t[:, 0]))
            clean = GridBlock("x_0, what it predicts", list(strip.x_0[:, 0]), captions)
            drawn[f"strip_{stage}"] = render_blocks([noisy, clean], columns=len(captions)), words
    return drawn


def condition_name(request: Request, classes: Sequence[str]) -> str:
    """Condition of an image in words: prompt, class name, or "no condition"."""
    if isinstance(request.label, int) and request.prompt is None:
        return readable(classes[request.label] if request.label < len(classes) else str(request.label))
    return "no condition" if request.prompt is None else request.prompt


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
    images, labels = [], []
    for number, row in enumerate(rows.values()):
        images += row
        labels += [f"condition {number}, and images made of it"] * len(row)
    return labelled_grid(images, labels)


def side_by_side(made: SampledImages, labels: Sequence[str]) -> bytes:
    """Grid of all stages of the generator: a row for each stage, and a column for each condition."""
    shown = list(dict.fromkeys(labels))[:COMPARED]
    blocks = []
    for stage, images in made.stages.items():
        heading = f"{readable(stage)}, {images.shape[1]} pixels"
        blocks.append(GridBlock(heading, [images[labels.index(label)] for label in shown]))
    return render_blocks([*blocks[:-1], blocks[-1]._replace(captions=shown)], columns=len(shown))


def draw_columns(rows: Mapping[str, np.ndarray]) -> bytes:
    """Grid of images (N, H, W, 3) by the names of their rows, images of one number below each other."""
    count = len(next(iter(rows.values())))
    blocks = []
    for start in range(0, count, GRIDS):
        blocks += [GridBlock(name, list(row[start : start + GRIDS])) for name, row in rows.items()]
    return render_blocks(blocks, columns=min(GRIDS, count))
