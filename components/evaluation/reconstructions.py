"""Reconstructions beside their originals (PSNR, SSIM, LPIPS, rFID), and the use of the codebook.

`rfid` is the Fréchet distance of the reconstructions to the same originals, in features. A figure's name has its N.
Shapes: N images, H W pixels, K codes, D features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from components.configuration.config import Since, refuse
from components.data.encoding import open_autoencoder
from components.evaluation import features
from components.evaluation.features import FeatureJob, FeatureSet, MeasureConfig, joined, read_arrays
from components.evaluation.gallery import GRIDS, INDEX_GRIDS, ORIGINALS, RECONSTRUCTIONS, TRAINED, draw_columns
from components.evaluation.image_sets import HELD_OUT, ImageSet, ShardImages
from components.evaluation.metrics import counted, published_name
from components.models.autoencoder import Autoencoder
from components.models.bottleneck import codebook_histogram, codebook_perplexity, codebook_usage
from components.models.losses.reconstruction import psnr, ssim
from components.runtime.pool import Later, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import absolute, digest_of, read_url
from components.sampling.device import best_device
from components.sampling.images import from_uint8, index_grids, to_uint8
from components.sampling.model import most_at_once
from components.weights.perceptual import load_perceptual_loss

PairedMetric = Literal["rfid", "psnr", "ssim", "lpips"]
TITLES = {"lpips": "lpips_vgg16"}  # in names of figures
HISTOGRAM = "histogram"  # array of the files


class PairsConfig(MeasureConfig):
    """Figures of reconstructions beside their originals, with the settings of distances."""

    pairs: Annotated[tuple[PairedMetric, ...], Since(())] = ()
    # URI: VGG-16's features.* and LPIPS's lin*.model.1.weight
    lpips_weights: Annotated[str | None, Since(None)] = None

    def _check(self) -> None:
        super()._check()
        lacking, rfid = "lpips" in self.pairs and self.lpips_weights is None, "rfid" in self.pairs
        refuse(lacking, "pairs: lpips needs lpips_weights, the URI of VGG-16 with LPIPS's layers (no package ships it)")
        refuse(rfid and self.feature_network == "none", "pairs: rfid needs a feature_network")

    def paired(self) -> tuple[str, ...]:
        """All that decides the figures of given pairs; reads the weights, raising as `read_url`."""
        if "lpips" not in self.pairs:
            return self.by_pair
        return (*self.by_pair, digest_of(read_url(absolute(str(self.lpips_weights)))).sha256)

    @property
    def by_pair(self) -> tuple[str, ...]:
        """Figures of single pairs."""
        return tuple(name for name in self.pairs if name != "rfid")


class PairMeasurer:
    """Figures of each pair by name, as a configuration asks for them."""

    def __init__(self, config: PairsConfig) -> None:
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
        self.names, self.device = config.by_pair, best_device()
        if "lpips" in config.pairs:
            loss = load_perceptual_loss("vgg16_lpips", weights_uri=config.lpips_weights)
            assert loss is not None
            self.measures["lpips"] = loss.to(self.device)

    @torch.inference_mode()
    def __call__(self, made: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (N, H, W, 3), twice -> float64 (N,) by name."""
        levels = [torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device) for images in (made, originals)]
        given = dict.fromkeys(self.names, levels)
        if "lpips" in given:
            given["lpips"] = [from_uint8(images).to(self.device) for images in (made, originals)]
        return {name: self.measures[name](*given[name]).double().cpu().numpy() for name in self.names}


class ReconstructionMeasurer:
    """Pool worker that reconstructs the images of a part and measures the reconstructions.
    The job's file has `features` (N, D) float32 of the reconstructions where a feature network is given, (N,) of each
    figure of `PairMeasurer`, and `histogram` (K,) int64, the count of each code, for an autoencoder with codes."""

    def __init__(self, autoencoder: Artifact, config: PairsConfig) -> None:
        self.network = open_autoencoder(autoencoder).to(best_device())
        self.features = None if config.feature_network == "none" else features.FeatureExtractor(config)
        self.pairs = PairMeasurer(config)

    def __call__(self, job: FeatureJob) -> Later:
        originals = [*job.part.batches()]
        made, histograms = zip(*(reconstruct(self.network, images) for images in originals), strict=True)
        arrays = {} if self.features is None else joined([self.features(images) for images in made])
        arrays |= joined([self.pairs(one, other) for one, other in zip(made, originals, strict=True)])
        if counts := [histogram for histogram in histograms if histogram is not None]:
            arrays[HISTOGRAM] = torch.stack(counts).sum(dim=0).numpy()
        return Later(partial(write_job, job.folder, job.name, features.pack(**arrays)))


def reconstruction_jobs(
    autoencoder: Artifact, parts: Sequence[ShardImages], config: PairsConfig, work: features.Measuring
) -> list[FeatureJob]:
    """Measures reconstructions into files beside the autoencoder."""
    folder = autoencoder.store.join(features.FEATURES)
    facts = (autoencoder.digest, *config.facts(), *config.paired())
    jobs = [features.feature_job(part, *facts)._replace(folder=folder) for part in parts]
    features.finish_features(partial(ReconstructionMeasurer, autoencoder, config), jobs, work)
    return jobs


def kept_figures(kept: Sequence[FeatureJob], config: PairsConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Use of the codebook, and the mean of each figure of pairs by name with N, over all finished jobs.
    Without codes the former is empty. Runs in a worker."""
    files = [read_arrays(job.folder, job.name) for job in kept]
    images = sum(job.part.num_images for job in kept)
    counts = [torch.from_numpy(arrays[HISTOGRAM]) for arrays in files if HISTOGRAM in arrays]
    use = codebook_use(torch.stack(counts).sum(dim=0), images) if counts else {}
    values = {name: np.concatenate([arrays[name] for arrays in files]) for name in config.by_pair}
    means = {TITLES.get(name, name): float(each.mean()) for name, each in values.items()}
    return use, {f"{name}_{counted(images)}": mean for name, mean in means.items()}


def codebook_use(histogram: Tensor, images: int) -> dict[str, float]:
    """Use of the codebook by a whole set of `images` images, from the histogram (K,) of codes.
    Usage is the share of codes that occur at all, perplexity the exponential of the entropy of their frequencies, in
    [1, K]. Single batches would underestimate both."""
    return {
        "codebook_size": len(histogram),
        "codebook_usage": float(codebook_usage(histogram)),
        "codebook_perplexity": float(codebook_perplexity(histogram)),
        "dead_codes": int((histogram == 0).sum()),
        "images": images,
    }


@torch.inference_mode()
def reconstruct(network: Autoencoder, images: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
    """Images (N, H, W, 3) uint8 through codes or a Gaussian's mean and back, at the network's resolution.
    Returns the reconstructions, uint8 (N, H, W, 3), and how often each code occurs, (K,) int64, if there are codes."""
    device, made, codes = next(network.parameters()).device, [], []
    for part in torch.from_numpy(images).split(most_at_once(network.resolution)):
        encoded = network.encode(from_uint8(part.to(device)))
        made.append(to_uint8(network.decode(encoded.z)))
        codes += [] if encoded.indices is None else [encoded.indices]
    if not codes:
        return np.concatenate(made), None
    histogram = codebook_histogram(torch.cat(codes), codebook_size=network.codebook_size)
    return np.concatenate(made), histogram.cpu()


def draw_kept(autoencoder: Artifact, parts: Sequence[ShardImages]) -> dict[str, bytes]:
    """The first images of the parts with reconstructions, and index grids of the codes: PNG by name.
    Index grids are drawn only for an autoencoder with codes. Runs in a worker."""
    network = open_autoencoder(autoencoder).to(best_device())
    batches = (images for part in parts for images in part.batches())
    originals = np.concatenate(list(islice(batches, RECONSTRUCTIONS)))[:RECONSTRUCTIONS]
    made, histogram = reconstruct(network, originals)
    name = ORIGINALS if parts[0].split == "holdout" else TRAINED
    drawn = {name: draw_columns({"original": originals, "reconstruction": made})}
    if histogram is not None:
        grids = to_uint8(index_grids(network, originals[:GRIDS]))  # (N, h, w, 3): each code a color
        of_codes = f"index grid, {grids.shape[1]} x {grids.shape[2]} codes"
        rows = {"original": originals[:GRIDS], of_codes: grids, "reconstruction": made[:GRIDS]}
        drawn[INDEX_GRIDS] = draw_columns(rows)
    return drawn


def measure_rfid(
    config: PairsConfig, originals: ImageSet, kept: Sequence[FeatureJob], work: features.Measuring
) -> dict[str, float]:
    """The distance of reconstructions (`kept`) to their originals, as `rfid_inception_1024`.
    Empty where it isn't asked for; a single original has none."""
    if "rfid" not in config.pairs or originals.num_images < 2:  # a distance is of a covariance
        return {}
    (reference,) = features.measure_features({HELD_OUT: originals}, config, work)
    measurer = partial(features.RowMeasurer, reference, seed=config.seed, metrics=())
    (row,) = work.pool.map(measurer, [FeatureSet("reconstructions", "model", tuple(kept))])
    return {f"r{published_name('distance', config.feature_network, row.samples)}": row.distance}
