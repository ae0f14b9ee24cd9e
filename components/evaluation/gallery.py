"""The pictures that the report shows: which requests make them, and the grids that are drawn of them.

Picture names are a contract with the report: `ROAD_by_class`, `ROAD_by_prompt`, `ROAD_by_condition` (each condition
picture before what was made of it), `ROAD_unconditional`, `strip_STAGE`, `cascade_side_by_side`,
`originals_and_reconstructions`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from components.configuration import Config
from components.evaluation.grids import Block, compared_grid, labelled_grid, readable, render_blocks, strip_grid
from components.evaluation.roads import (
    SampledPictures,
    SampleJob,
    accepts,
    jobs_of,
    joined,
    read_job,
    shown_requests,
)
from components.pool import file_name
from components.sampling.cascade import Cascade, to_uint8
from components.sampling.pictures import read_picture
from components.sampling.requests import Request
from components.storage.store import Store

STRIP = "strip"
ORIGINALS = "originals_and_reconstructions"
SIDE_BY_SIDE = 6  # conditions of which the cascade's stages are shown beside each other
SEED_APART = 1_000_000  # shown pictures have other seeds than measured ones
RECONSTRUCTIONS = 24
UNCONDITIONAL = 32  # pictures shown of a model that takes no condition


class GalleryConfig(Config):
    """What is shown of each road."""

    pictures_per_class: int = Field(6, ge=1)
    max_classes: int = Field(12, ge=1)
    prompts: tuple[str, ...] = ()  # empty: the captions of the first held-out pictures
    num_prompts: int = Field(8, ge=0)  # how many of these
    pictures_per_prompt: int = Field(6, ge=1)
    strip_frames: int = Field(8, ge=2)
    guidance_scale: float | None = Field(None, ge=0)  # of shown pictures; None is the model's own


def gallery_requests(
    config: GalleryConfig,
    cascade: Cascade,
    *,
    captions: Sequence[str],
    pictures: Sequence[bytes] = (),
    seed: int,
) -> dict[str, list[Request]]:
    """Picture name -> requests, as far as the models of the road take such conditions.

    Args:
        captions: prompts to choose from, where the configuration names none.
        pictures: condition pictures (PNG), for a cascade that takes one.
    """
    found = {}
    for road in cascade.roads:
        prompts = config.prompts or fitting_captions(cascade, road, captions)[: config.num_prompts]
        bare = Request(road=road, guidance_scale=config.guidance_scale)
        asked = {
            "class": [bare._replace(label=label) for label in range(len(cascade.classes(road)))[: config.max_classes]],
            "prompt": [bare._replace(prompt=prompt) for prompt in prompts],
            "condition": [bare._replace(condition=picture) for picture in pictures],
        }
        if not any(asked.values()):
            asked = {"unconditional": [bare]}
        each = {"class": config.pictures_per_class, "unconditional": UNCONDITIONAL}
        for kind, requests in asked.items():
            count = each.get(kind, config.pictures_per_prompt)
            shown = shown_requests(cascade, requests, each=count, seed=seed + SEED_APART)
            found |= {f"{road}_{'' if kind == 'unconditional' else 'by_'}{kind}": shown} if shown else {}
    return found


def fitting_captions(cascade: Cascade, road: str, captions: Sequence[str]) -> tuple[str, ...]:
    """The captions that the road takes as prompts, each once."""
    once = dict.fromkeys(caption for caption in captions if caption)
    return tuple(caption for caption in once if accepts(cascade, Request(prompt=caption, road=road)))


def gallery_jobs(requests: Mapping[str, Sequence[Request]], *, strip_frames: int) -> list[SampleJob]:
    """The jobs of all shown pictures, and of one denoising strip."""
    jobs = [job for name, asked in requests.items() for job in jobs_of(name, asked)]
    denoised = [asked[0] for asked in requests.values() if asked and asked[0].road == "diffusion"]
    return jobs + [SampleJob(STRIP, tuple(denoised[-1:]), frames=strip_frames)] * bool(denoised)


def read_gallery(requests: Mapping[str, Sequence[Request]], files: Store) -> dict[str, SampledPictures]:
    """What the jobs left in `files`, joined by picture name."""
    made = {
        name: joined([read_job(job.name, files) for job in jobs_of(name, asked)])
        for name, asked in requests.items()
        if asked
    }
    return made | ({STRIP: read_job(STRIP, files)} if files.exists(file_name(STRIP)) else {})


def draw_gallery(
    requests: Mapping[str, Sequence[Request]], made: Mapping[str, SampledPictures], *, classes: Sequence[str]
) -> dict[str, bytes]:
    """Picture name -> PNG, of what was sampled: made[name] for each name of `requests`, and made["strip"]."""
    drawn = {}
    for name, asked in requests.items():
        if asked:
            labels = [condition_name(request, classes) for request in asked]
            if asked[0].condition is not None:
                drawn[name] = condition_grid(asked, made[name].finished)
                continue
            drawn[name] = labelled_grid(list(made[name].finished), labels)
            if len(made[name].stages) > 1 and "cascade_side_by_side" not in drawn:
                drawn["cascade_side_by_side"] = side_by_side(made[name], labels)
    if STRIP in made:
        drawn |= {f"strip_{stage}": draw_strip(made[STRIP], stage) for stage in made[STRIP].strips}
    return drawn


def condition_name(request: Request, classes: Sequence[str]) -> str:
    """What a picture was asked for by, as people read it."""
    if request.prompt is not None:
        return request.prompt
    if isinstance(request.label, int):
        return readable(classes[request.label] if request.label < len(classes) else str(request.label))
    return "no condition"


def condition_grid(requests: Sequence[Request], finished: np.ndarray) -> bytes:
    """A row for each condition picture: first itself, then what was made of it."""
    rows: dict[bytes, list[np.ndarray]] = {}
    for request, picture in zip(requests, finished, strict=True):
        png = request.condition or b""
        rows.setdefault(png, [condition_picture(png, resolution=picture.shape[0])]).append(picture)
    labels = [f"condition {number}, and pictures made of it" for number, row in enumerate(rows.values()) for _ in row]
    return labelled_grid([picture for row in rows.values() for picture in row], labels)


def condition_picture(png: bytes, *, resolution: int) -> np.ndarray:  # (H, W, 3) uint8
    return to_uint8(read_picture(png, resolution=resolution)[None])[0]


def side_by_side(made: SampledPictures, labels: Sequence[str]) -> bytes:
    """The picture of each stage of the road, in a row for each stage; one column for each condition."""
    columns = [labels.index(label) for label in dict.fromkeys(labels)][:SIDE_BY_SIDE]
    blocks = [
        Block(f"{readable(stage)}, {pictures.shape[1]} pixels", [pictures[column] for column in columns])
        for stage, pictures in made.stages.items()
    ]
    captions = [labels[column] for column in columns]
    return render_blocks([*blocks[:-1], blocks[-1]._replace(captions=captions)], columns=len(columns))


def draw_strip(made: SampledPictures, stage: str) -> bytes:
    """The strip of a stage's first picture."""
    strip = made.strips[stage]
    captions = [f"t = {timestep:.4g}" for timestep in strip.timesteps]
    return strip_grid(list(strip.x_t[:, 0]), list(strip.x_0[:, 0]), captions)


def draw_reconstructions(originals: np.ndarray, reconstructions: np.ndarray) -> bytes:
    """Originals (N, H, W, 3) with their reconstructions right below them, the first of both."""
    return compared_grid(
        list(originals[:RECONSTRUCTIONS]),
        list(reconstructions[:RECONSTRUCTIONS]),
        headings=("original", "reconstruction"),
    )
