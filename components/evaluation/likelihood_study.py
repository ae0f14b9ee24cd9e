"""Held-out bits/dim of a diffusion model: the variational bound, term by term.

Ho et al., 2020, equation 5:

    prior           KL(q(x_T | x_0) || N(0, I)), which no network decides
    denoising       sum over t of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    reconstruction  -log2 p(x_0 | x_1) of the 8-bit values, the term of index 0

The sum over all T terms takes T passes for each image. With fewer times an image it is estimated without bias:
[0, T) is cut into as many strata, finer where the terms are larger, and one time drawn from each stands for its
stratum. Index 0 is always a stratum of its own.

Shapes: N images, K times of an image (T if the sum is exact). Terms are bits/dim.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.evaluation.plots import Panel, Series, plot_svg
from components.models.diffusion.discrete import DiscreteObjective, prior_bits
from components.models.diffusion.objective import make_objective
from components.runtime.pool import Pool, file_name, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8, one_channel
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import Plan, encode_conditions, random_stream

JOB_IMAGES = 8
BATCH = 64  # times of one image at once
STREAM = "likelihood"  # of the noise
CURVE_POINTS = 200  # of the plot

Term = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_0, noise, timesteps), B rows each -> bits/dim (B,)


class BoundTerms(NamedTuple):
    """Terms of the bound for N images."""

    prior: np.ndarray  # (N,)
    terms: np.ndarray  # (N, K): index 0 of each row is the reconstruction
    timesteps: np.ndarray  # (N, K) int64, ascending
    weights: np.ndarray  # (K,): how many timesteps each time stands for; all 1 if the sum is exact


class BoundJob(NamedTuple):
    """Images with labels, for all terms by a single worker."""

    name: str  # of its file, without `.npz`
    first: int  # place among the held-out images: names the random stream
    image: np.ndarray  # (N, H, W, 3) uint8
    label: np.ndarray  # (N,) int64
    caption: tuple[str, ...]


def strata(num_timesteps: int, count: int) -> np.ndarray:
    """Edges (count + 1,) of strata of [0, num_timesteps) with widths that grow linearly with t.

    The first stratum holds 0 alone.

    Raises ValueError if count is not in [2, num_timesteps], or 1 for a single timestep.
    """
    if not min(2, num_timesteps) <= count <= num_timesteps:
        raise ValueError(f"timesteps_per_image must be in [2, {num_timesteps}], not {count}")
    number = np.arange(count + 1)
    edges = np.maximum(number, np.rint(num_timesteps * (number / count) ** 2).astype(np.int64))
    edges[1] = 1
    return edges


def image_terms(
    term: Term, x_0: Tensor, *, edges: np.ndarray, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (K,), drawn from each stratum, with the terms (K,) of an image x_0 (C, H, W) in [-1, 1]."""
    widths = torch.from_numpy(np.diff(edges))
    drawn = (torch.rand(len(widths), generator=generator, dtype=torch.float64) * widths).long()
    timesteps = torch.from_numpy(edges[:-1]) + drawn
    found = []
    for part in timesteps.split(BATCH):
        noise = torch.stack([torch.randn(x_0.shape, generator=generator) for _ in part]).to(x_0.device)
        found.append(term(x_0.expand(len(part), *x_0.shape), noise, part.to(x_0.device)).cpu())
    return timesteps.numpy(), torch.cat(found).numpy()


def joined_terms(parts: Sequence[BoundTerms]) -> BoundTerms:
    """Terms of the images of all parts in order; the weights are equal in all parts."""
    prior, terms, timesteps, weights = zip(*parts, strict=True)
    return BoundTerms(np.concatenate(prior), np.concatenate(terms), np.concatenate(timesteps), weights[0])


def bound_parts(found: BoundTerms) -> dict[str, np.ndarray]:
    """The bound and the parts of the bound for each image, (N,) each."""
    weighted = found.terms * found.weights
    denoising, reconstruction = weighted[:, 1:].sum(axis=1), weighted[:, 0]
    return {
        "": found.prior + denoising + reconstruction,
        "prior": found.prior,
        "denoising": denoising,
        "reconstruction": reconstruction,
    }


def is_exact(found: BoundTerms) -> bool:
    """True if every timestep was taken; otherwise all but prior and reconstruction are estimates."""
    return bool((found.weights == 1).all())


def summarize(found: BoundTerms, *, png: np.ndarray) -> dict[str, float]:
    """Metrics: means over images of the bound and the three parts, each with a standard error.

    `held_out_bits_per_dim` is the exact sum over t, `estimated_held_out_bits_per_dim` the stratified estimate.
    `png_bits_per_dim` is what the same images take as PNGs, png (N,).
    """
    prefix = "held_out" if is_exact(found) else "estimated_held_out"
    metrics = {}
    for part, values in bound_parts(found).items():
        name = "_".join(filter(None, (prefix, "bits_per_dim", part)))
        metrics |= {name: float(values.mean()), f"{name}_standard_error": standard_error(values)}
    return metrics | {"png_bits_per_dim": float(png.mean())}


def bound_table(found: BoundTerms, *, png: np.ndarray) -> dict[str, Any]:
    """Columns and rows for the report; the last row is the images as PNGs, png (N,)."""
    terms = "all t" if is_exact(found) else f"{found.terms.shape[1]} strata of t"
    return {
        "columns": ["term", "bits/dim", "standard error", "images", "sum over"],
        "rows": [
            *(
                [part or "bound", float(values.mean()), standard_error(values), len(values), terms]
                for part, values in bound_parts(found).items()
            ),
            ["as PNG", float(png.mean()), standard_error(png), len(png), "–"],
        ],
    }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values (N,).

    The unbiased deviation over the root of N; NaN for a single value.
    """
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def term_curve(found: BoundTerms) -> Series:
    """Mean term at each timestep or stratum, from 1 on, thinned where neighbors can't be told apart."""
    x, y = found.timesteps.mean(axis=0)[1:], found.terms.mean(axis=0)[1:]
    places = np.unique(np.geomspace(1, len(x), CURVE_POINTS).round().astype(int)) - 1 if len(x) else np.zeros(0, int)
    return Series("denoising", x[places].tolist(), y[places].tolist())


def draw_terms(found: BoundTerms, *, salt: str) -> str:
    """Plot of the terms over t, and of the sum of the terms from t on, as SVG."""
    x = found.timesteps.mean(axis=0)
    cumulated = found.prior.mean() + (found.terms * found.weights).mean(axis=0)[::-1].cumsum()[::-1]
    places = np.unique(np.geomspace(1, len(x), CURVE_POINTS).round().astype(int)) - 1
    rest = Series("bound from t on", (x[places] + 1).tolist(), cumulated[places].tolist())
    terms = term_curve(found)
    each = Panel("t + 1", "bits/dim of one step", [terms._replace(x=[t + 1 for t in terms.x])])
    return plot_svg(
        [
            each._replace(log_x=True, log_y=True, markers=False),
            Panel("t + 1", "bits/dim", [rest], log_x=True, markers=False),
        ],
        salt=salt,
    )


def bound_jobs(image: np.ndarray, label: np.ndarray, caption: Sequence[str]) -> list[BoundJob]:
    """Images (N, H, W, 3) with their conditions cut into jobs called bound-000, bound-001, …"""
    parts = [slice(start, start + JOB_IMAGES) for start in range(0, len(image), JOB_IMAGES)]
    return [
        BoundJob(f"bound-{number:03d}", part.start, image[part], label[part], tuple(caption[part]))
        for number, part in enumerate(parts)
    ]


class BoundWorker:
    """Actor of the pool that measures the terms of the images of a job."""

    def __init__(self, model: Artifact, files: Store, *, timesteps_per_image: int | None, seed: int) -> None:
        device = best_device()
        with model.local_copy() as folder:
            self.model, self.files = load_model(model.stage, folder, device=device), files
        self.count, self.seed = timesteps_per_image, seed

    def __call__(self, job: BoundJob) -> BoundJob:
        found = measure_bound(self.model, job, timesteps_per_image=self.count, seed=self.seed)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **found._asdict())
        write_job(self.files, job.name, buffer.getvalue())
        return job


@torch.no_grad()
def measure_bound(model: SamplingModel, job: BoundJob, *, timesteps_per_image: int | None, seed: int) -> BoundTerms:
    """Terms of a job's images under each image's own conditions; None takes all timesteps.

    Neither the job nor the batch moves the terms: each image has its own random stream.
    """
    objective = make_objective(model.settings["objective"])
    assert isinstance(objective, DiscreteObjective)
    total = len(objective.schedule)
    edges = strata(total, timesteps_per_image or total)
    x_0 = pixels_of(model, job.image).to(model.device)
    rows = []
    for place, image in enumerate(x_0):
        condition = condition_of(model, label=int(job.label[place]), caption=job.caption[place])
        generator = random_stream(seed + job.first + place, STREAM)
        term = partial(term_of, model, objective, condition)
        rows.append(image_terms(term, image, edges=edges, generator=generator))
    timesteps, terms = (np.stack(column) for column in zip(*rows, strict=True))
    prior = prior_bits(objective.schedule, x_0.double()).cpu().numpy()
    return BoundTerms(prior, terms, timesteps, np.diff(edges))


def term_of(
    model: SamplingModel,
    objective: DiscreteObjective,
    condition: Mapping[str, Tensor],
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Term of the bound for each row, (B,) float64: most terms are too small for less precision.

    condition has a single row. The predicted x_0 is clipped, as in sampling.
    """
    x_t = objective.add_noise(x_0, noise, timesteps)
    rows = {name: value.expand(len(x_0), *value.shape[1:]) for name, value in condition.items()}
    output = objective.apply(model.module, x_t, timesteps, **rows).double()
    return objective.bits(output, x_0=x_0.double(), x_t=x_t.double(), time=timesteps, clip=True)


def condition_of(model: SamplingModel, *, label: int, caption: str) -> dict[str, Tensor]:
    """Accepted conditions of the model, with a single row each."""
    return encode_conditions(model, [Plan(label=label, prompt=caption or None)]).condition


def check_model(model: SamplingModel) -> None:
    """Raises ValueError, with a message of one line, for a model without a known bound."""
    if model.settings.get("role", "base") != "base":
        raise ValueError(f"{model.name} is an upsampler; the bound is measured of a base model")
    if model.settings.get("objective", {}).get("kind") != "discrete":
        raise ValueError("only diffusion in discrete steps has this bound; give a model with objective discrete")


def read_bound(files: Store, jobs: Sequence[BoundJob]) -> BoundTerms:
    """Reads the terms of all jobs, joined in the order of the jobs."""
    parts = []
    for job in jobs:
        with np.load(io.BytesIO(files.read(file_name(job.name))), allow_pickle=False) as arrays:
            parts.append(BoundTerms(*(arrays[field] for field in BoundTerms._fields)))
    return joined_terms(parts)


def measure_bounds(
    jobs: Sequence[BoundJob],
    model: Artifact,
    *,
    timesteps_per_image: int | None,
    seed: int,
    files: Store,
    pool: Pool,
) -> Iterator[BoundJob]:
    """Measures the jobs with missing files; yields each job when the file is written."""
    worker = partial(BoundWorker, model, files, timesteps_per_image=timesteps_per_image, seed=seed)
    yield from pool.finish(worker, jobs, files=files)


def pixels_of(model: SamplingModel, image: np.ndarray) -> Tensor:
    """Image values for the model from (N, H, W, 3): (N, 3, H, W) in [-1, 1], or (N, 1, H, W) of gray.

    Raises ColorError for images in color and a model of a single channel.

    Raises ColorError for images in color where it knows one channel.
    """
    x_0 = from_uint8(image)
    channels = model.network.get("in_channels", model.network.get("num_channels"))
    return one_channel(x_0) if channels == 1 else x_0


def png_bits(model: SamplingModel, image: np.ndarray) -> np.ndarray:
    """Bits/dim of each image (N, H, W, 3) as the smallest PNG by Pillow, (N,).

    The PNG holds the channels that the model knows. Raises as `pixels_of`.
    """
    channels = pixels_of(model, image).shape[1]
    values = image[..., 0] if channels == 1 else image
    return np.array([8 * len(encode_png(one, optimize=True)) / one.size for one in values])
