"""Study of held-out bits/dim: exact (PixelCNN, Row LSTM), or a bound (VAE, diffusion).

A dimension is an 8-bit value of a channel that the model knows, and all models are measured on the same images. The
variational bound of diffusion is measured term by term (Ho et al., 2020, equation 5):

    prior           KL(q(x_T | x_0) || N(0, I)), which no network decides
    denoising       sum over t of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    reconstruction  -log2 p(x_0 | x_1) of the 8-bit values, the term of index 0

The sum over all T terms takes T passes for each image. With fewer times an image it is estimated without bias:
[0, T) is cut into as many strata, finer where the terms are larger, and one time drawn from each stands for its
stratum. Index 0 is always a stratum of its own.
Shapes: N images, C colors, H W their pixels, V values, K times of an image (T if the sum is exact).
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from pydantic import Field
from torch import Tensor

from components.configuration.config import Config
from components.configuration.families import family_of
from components.evaluation.features import joined, read_arrays
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.study import ArrayWorker, Findings, ModelStudy, StudyPlan, load_trained
from components.models.autoencoder import Autoencoder
from components.models.bottleneck import GaussianBottleneck
from components.models.diffusion.corruption import to_levels
from components.models.diffusion.discrete import DiscreteObjective, prior_bits
from components.models.diffusion.objective import make_objective
from components.models.losses.reconstruction import discretized_logistic_nll
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8, one_channel
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, encode_conditions, random_stream

JOB_IMAGES = 8
BATCH = 64  # times of one image at once
STREAM = "likelihood"  # of the noise
CURVE_POINTS = 200  # of the plot

Term = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_0, noise, timesteps), B rows each -> bits/dim (B,)
TABLE = "Bits/dim of held-out images"
PNG_CONTAINER = 57  # bytes of signature, header and chunks
MOST_ROWS = 16383  # of a WebP
LOSSLESS = {  # row of the table: metric
    "each as a PNG, its data alone": "png_bits_per_dim",
    "all as one PNG": "set_png_bits_per_dim",
    "all as one lossless WebP": "set_webp_bits_per_dim",
    "entropy of single values": "value_entropy_bits_per_dim",
}


class BoundJob(NamedTuple):
    """Images with their conditions, for a single worker."""

    name: str  # of its file, without `.npz`
    first: int  # place among the held-out images: names the random stream
    image: np.ndarray  # (N, H, W, 3) uint8
    label: np.ndarray  # (N,) int64
    caption: tuple[str, ...]

    def condition(self, model: SamplingModel, place: int) -> dict[str, Tensor]:
        """Conditions of the image at a place that the model accepts, with a single row each."""
        own = Plan(label=int(self.label[place]), prompt=self.caption[place] or None)
        return encode_conditions(model, [own]).condition


class BoundTerms(NamedTuple):
    """Terms of the bound for N images."""

    prior: np.ndarray  # (N,)
    terms: np.ndarray  # (N, K): index 0 of each row is the reconstruction
    timesteps: np.ndarray  # (N, K) int64, ascending
    weights: np.ndarray  # (K,): timesteps that each stands for; all 1 if exact

    @property
    def is_exact(self) -> bool:
        """True if every timestep was taken; otherwise all but prior and reconstruction are estimates."""
        return bool((self.weights == 1).all())

    def parts(self) -> dict[str, np.ndarray]:
        """The bound (by the empty name) and the parts of the bound for each image, (N,) each."""
        weighted = self.terms * self.weights
        denoising, reconstruction = weighted[:, 1:].sum(axis=1), weighted[:, 0]
        parts = {"prior": self.prior, "denoising": denoising, "reconstruction": reconstruction}
        return {"": self.prior + denoising + reconstruction} | parts


class LikelihoodStudy(ModelStudy["LikelihoodConfig"]):
    """Bits/dim of held-out images under each image's own conditions; the input is `model`."""

    def plan(self) -> StudyPlan:
        """Held-out images cut into jobs.
        Raises ValueError for a model that has no such bound, a set that holds no image out, or one in color where the
        model knows one channel."""
        model = load_trained(self.models["model"])
        check_likelihood(model)
        held_out = self.held_out(resolution=model.settings["resolution"], limit=self.config.samples)
        jobs = bound_jobs(held_out.image, held_out.label, held_out.caption)
        facts = family_of(model.kind).likelihood, lossless_bits(model, held_out.image)
        return StudyPlan({"bound": jobs}, facts=facts)

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that measures the images of a job."""
        return ArrayWorker(partial(load_trained, self.models["model"]), self.bits, self.files)

    def bits(self, model: SamplingModel, job: BoundJob) -> dict[str, np.ndarray]:
        """The terms of a diffusion model's bound, or bits/dim of whole images."""
        seed, steps = self.config.seed, self.config.timesteps_per_image
        if family_of(model.kind).likelihood is None:
            return measure_bound(model, job, timesteps_per_image=steps, seed=seed)._asdict()
        return {"bits": measure_bits(model, job, seed=seed)}

    def images_of(self, job: BoundJob) -> int:
        return len(job.image)

    def findings(self, plan: StudyPlan, measured: Any) -> Findings:
        """A table with standard errors over images, the figures, and of a diffusion model plots over t."""
        # of whole images, or None: terms of a diffusion model's bound; bits/dim of lossless files
        likelihood, lossless = plan.facts
        files = [read_arrays(self.files, job.name) for job in plan.jobs]
        plots = {}
        arrays = joined(files)
        if likelihood is None:
            bound = BoundTerms(**arrays)._replace(weights=files[0]["weights"])
            table, summary = bound_figures(bound, lossless=lossless)
            plots = {"Terms of the bound over t": draw_terms(bound, salt=self.stage)}
        else:
            whole = "exact" if likelihood == "exact" else "bound, one draw of the latent"
            table, summary = bits_figures({whole: ("held_out_bits_per_dim", arrays["bits"])}, lossless=lossless)
        headline = {name: value for name, value in summary.items() if not name.endswith("standard_error")}
        return Findings(plots, {TABLE: table}, summary, headline, {})


class LikelihoodConfig(Config):
    """Number of images, and the choice of an exact or estimated bound of a diffusion model."""

    study: ClassVar[type] = LikelihoodStudy

    stage_version = 3  # PNGs without their container, and the set as one file beside

    samples: int = Field(256, ge=2)  # held-out images; of one there is no error of the mean
    # None: all, the exact sum; fewer are a stratified estimate
    timesteps_per_image: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


def strata(num_timesteps: int, count: int) -> np.ndarray:
    """Edges (count + 1,) of strata of [0, num_timesteps) with widths that grow linearly with t.
    The first holds 0 alone. Raises ValueError if count is not in [2, num_timesteps], or 1 for a single timestep."""
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
    timesteps, terms = torch.from_numpy(edges[:-1]) + drawn, []
    for part in timesteps.split(BATCH):
        noise = torch.stack([torch.randn(x_0.shape, generator=generator) for _ in part]).to(x_0.device)
        terms.append(term(x_0.expand(len(part), *x_0.shape), noise, part.to(x_0.device)).cpu())
    return timesteps.numpy(), torch.cat(terms).numpy()


@torch.no_grad()
def measure_bound(model: SamplingModel, job: BoundJob, *, timesteps_per_image: int | None, seed: int) -> BoundTerms:
    """Terms of a job's images under each image's own conditions; None takes all timesteps.
    Neither the job nor the batch moves the terms: each image has its own random stream. The predicted x_0 is clipped,
    as in sampling; terms are float64, as most are too small for less precision."""
    objective = make_objective(model.settings["objective"])
    assert isinstance(objective, DiscreteObjective)
    total = len(objective.schedule)
    edges, x_0 = strata(total, timesteps_per_image or total), pixels_of(model, job.image).to(model.device)
    rows = []
    for place, image in enumerate(x_0):
        condition = job.condition(model, place)

        def term(x_0: Tensor, noise: Tensor, timesteps: Tensor, condition: dict[str, Tensor] = condition) -> Tensor:
            x_t = objective.add_noise(x_0, noise, timesteps)
            own = {name: value.expand(len(x_0), *value.shape[1:]) for name, value in condition.items()}
            output = objective.apply(model.module, x_t, timesteps, **own).double()
            return objective.bits(output, x_0=x_0.double(), x_t=x_t.double(), time=timesteps, clip=True)

        generator = random_stream(seed + job.first + place, STREAM)
        rows.append(image_terms(term, image, edges=edges, generator=generator))
    timesteps, terms = (np.stack(column) for column in zip(*rows, strict=True))
    prior = prior_bits(objective.schedule, x_0.double()).cpu().numpy()
    return BoundTerms(prior, terms, timesteps, np.diff(edges))


def pixels_of(model: SamplingModel, image: np.ndarray) -> Tensor:
    """Image values for the model from (N, H, W, 3): (N, 3, H, W) in [-1, 1], or (N, 1, H, W) of gray.
    Raises ColorError for images in color and a model of a single channel."""
    x_0 = from_uint8(image)
    names = ("in_channels", "num_channels", "image_channels")  # each network has one at most
    channels = next((model.network[name] for name in names if name in model.network), None)
    return one_channel(x_0) if channels == 1 else x_0


def draw_terms(bound: BoundTerms, *, salt: str) -> str:
    """Plot of the terms over t, and of the sum of the terms from t on, as SVG.
    Mean terms at each timestep or stratum, those of single steps from 1 on, thinned where neighbors can't be told
    apart."""
    x, y = bound.timesteps.mean(axis=0), bound.terms.mean(axis=0)
    rest = bound.prior.mean() + (bound.terms * bound.weights).mean(axis=0)[::-1].cumsum()[::-1]

    def thinned(name: str, x: np.ndarray, y: np.ndarray) -> list[Series]:
        places = np.unique(np.geomspace(1, len(x), CURVE_POINTS).round().astype(int)) - 1 if len(x) else []
        return [Series(name, [x[place] + 1 for place in places], [y[place] for place in places])]

    terms, sums = thinned("denoising", x[1:], y[1:]), thinned("bound from t on", x, rest)
    of_steps = Panel("t + 1", "bits/dim of one step", terms, log_x=True, log_y=True, markers=False)
    of_sums = Panel("t + 1", "bits/dim", sums, log_x=True, markers=False)
    return plot_svg([of_steps, of_sums], salt=salt)


def bound_jobs(image: np.ndarray, label: np.ndarray, caption: Sequence[str]) -> list[BoundJob]:
    """Images (N, H, W, 3) with their conditions cut into jobs called bound-000, bound-001, …"""
    parts = [slice(start, start + JOB_IMAGES) for start in range(0, len(image), JOB_IMAGES)]
    return [
        BoundJob(f"bound-{number:03d}", part.start, image[part], label[part], tuple(caption[part]))
        for number, part in enumerate(parts)
    ]


@torch.no_grad()
def measure_bits(model: SamplingModel, job: BoundJob, *, seed: int) -> np.ndarray:
    """Bits/dim of each image under the image's own label, (N,) float64.
    Exact, or of a VAE with one draw of the latent. Images pass alone, so the cut into jobs changes no bit."""
    bits = []
    for place, image in enumerate(pixels_of(model, job.image).to(model.device).split(1)):
        if family_of(model.kind).likelihood == "bound":  # Kingma & Welling, 2014, equation 3
            assert isinstance(model.module, Autoencoder)
            generator = random_stream(seed + job.first + place, STREAM)
            noise = torch.randn(1, *model.module.latent_shape, generator=generator).to(image.device)
            output, encoded = model.module(image, noise=noise)
            reconstruction = discretized_logistic_nll(output, image=image).double().sum()
            nats = float(reconstruction + encoded.losses["kl_loss"].double())
        else:
            values = to_levels(image).round().long()  # exact: they were 8-bit images
            output = model.module(values, **job.condition(model, place))
            logits = rearrange(output, "1 c h w k -> (c h w) k").double()
            nats = float(F.cross_entropy(logits, values.flatten(), reduction="sum"))
        bits.append(nats / (image.numel() * math.log(2)))
    return np.array(bits)


def check_likelihood(model: SamplingModel) -> None:
    """Raises ValueError of one line for a model without a likelihood of 8-bit values or a bound on it."""
    network, likelihood = model.module, family_of(model.kind).likelihood
    if likelihood is None and model.settings.get("role", "base") != "base":
        raise ValueError(f"{model.name} is an upsampler; the bound is measured of a base model")
    if likelihood is None and model.settings.get("objective", {}).get("kind") != "discrete":
        raise ValueError("only diffusion in discrete steps has this bound; give a model with objective discrete")
    if likelihood == "exact" and model.settings.get("resolution") is None:
        raise ValueError(f"{model.name} knows tokens; only a likelihood of pixels compares")
    vae = isinstance(getattr(network, "bottleneck", None), GaussianBottleneck)
    if likelihood == "bound" and not (vae and model.network.get("reconstruction") == "discretized_logistic"):
        raise ValueError(
            f"{model.name} has no bound on 8-bit values; train with bottleneck gaussian, reconstruction "
            "discretized_logistic"
        )


def lossless_bits(model: SamplingModel, image: np.ndarray) -> dict[str, np.ndarray]:
    """Bits/dim of images (N, H, W, 3) by lossless codecs, by names of LOSSLESS.
    Of each image (N,): the smallest PNG by Pillow without its container of 57 bytes. Of all images (1,): one such PNG
    and one lossless WebP of them below each other, and the entropy of single values; all of the channels that the
    model knows. Raises as `pixels_of`."""
    values = image[..., 0] if pixels_of(model, image).shape[1] == 1 else image
    columns = math.ceil(len(values) / (MOST_ROWS // values.shape[1]))  # of whole images
    filled = np.concatenate([values, np.repeat(values[-1:], -len(values) % columns, axis=0)])
    column, webp = rearrange(filled, "(r c) h w ... -> (r h) (c w) ...", c=columns), io.BytesIO()
    Image.fromarray(column).save(webp, format="WEBP", lossless=True, quality=100, method=6)
    channels = values.reshape(-1, 3 if values.ndim == 4 else 1).T
    each = [8 * (len(encode_png(one, optimize=True)) - PNG_CONTAINER) / one.size for one in values]
    png = 8 * (len(encode_png(column, optimize=True)) - PNG_CONTAINER) / values.size
    shares = [np.unique(channel, return_counts=True)[1] / len(channel) for channel in channels]
    single = np.mean([-(share * np.log2(share)).sum() for share in shares])
    return dict(zip(LOSSLESS, map(np.atleast_1d, (each, png, 8 * webp.tell() / values.size, single)), strict=True))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values (N,): the unbiased deviation over the root of N.
    NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def bits_figures(
    parts: Mapping[str, tuple[str, np.ndarray]], *, lossless: Mapping[str, np.ndarray], sum_over: str = ""
) -> tuple[dict[str, Any], dict[str, float]]:
    """Table for the report and figures by metric: means over images of bits/dim, with standard errors.
    `parts`: row of the table -> metric and values (N,). `lossless`: what the same images take without a model, as
    `lossless_bits` returns it. `sum_over`: the t of sums of terms."""
    rows, summary = [], dict[str, float]()
    images = len(next(iter(parts.values()))[1])
    unmodeled = {name: ("", values) for name, values in lossless.items()}
    for name, (metric, values) in {**parts, **unmodeled}.items():
        mean, error = float(values.mean()), standard_error(values)
        row = [name, mean, error, images]
        if sum_over:
            row.append(sum_over if metric else "–")
        rows.append(row)
        summary[metric or LOSSLESS[name]] = mean
        if metric:
            summary[f"{metric}_standard_error"] = error
    columns = ["term" if sum_over else "likelihood", "bits/dim", "standard error", "images"]
    return {"columns": columns + ["sum over"] * bool(sum_over), "rows": rows}, summary


def bound_figures(bound: BoundTerms, *, lossless: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, float]]:
    """Table and figures of the bound and its parts: `held_out_bits_per_dim` is the exact sum over t.
    `estimated_held_out_bits_per_dim` is the stratified estimate."""
    metric = f"{'' if bound.is_exact else 'estimated_'}held_out_bits_per_dim"
    parts = {part or "bound": (f"{metric}_{part}".rstrip("_"), values) for part, values in bound.parts().items()}
    sum_over = "all t" if bound.is_exact else f"{bound.terms.shape[1]} strata of t"
    return bits_figures(parts, lossless=lossless, sum_over=sum_over)
