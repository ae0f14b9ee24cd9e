"""Reconstruction quality of an autoencoder, and the use of the codebook.

Shapes: N images, H W pixels, K codes, D features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from components.data.encoding import open_autoencoder
from components.evaluation.features import (
    FeatureJob,
    extractor_of,
    feature_job,
    finish_features,
    joined,
    pack,
    read_arrays,
)
from components.evaluation.gallery import (
    GRIDS,
    INDEX_GRIDS,
    ORIGINALS,
    RECONSTRUCTIONS,
    draw_index_grids,
    draw_reconstructions,
)
from components.evaluation.image_sets import ShardImages
from components.evaluation.networks import FEATURES
from components.evaluation.pairs import PairMeasurer, PairsConfig
from components.models.autoencoder import Autoencoder
from components.models.bottleneck import codebook_histogram, codebook_perplexity, codebook_usage
from components.runtime.pool import Later, Pool, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.device import best_device
from components.sampling.images import from_uint8, index_grids, to_uint8
from components.sampling.model import most_at_once

HISTOGRAM = "histogram"  # array of the files


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


class ReconstructionMeasurer:
    """Pool worker that reconstructs the images of a part and measures the reconstructions.
    The job's file has `features` (N, D) float32 of the reconstructions where a feature network is given, (N,) of each
    figure of `PairMeasurer`, and `histogram` (K,) int64, the count of each code, for an autoencoder with codes."""

    def __init__(self, autoencoder: Artifact, config: PairsConfig) -> None:
        self.network = open_autoencoder(autoencoder).to(best_device())
        self.features = None if config.feature_network == "none" else extractor_of(config)
        self.pairs = PairMeasurer(config)

    def __call__(self, job: FeatureJob) -> Later:
        originals = [*job.part.batches()]
        made, histograms = zip(*(reconstruct(self.network, images) for images in originals), strict=True)
        arrays = {} if self.features is None else joined([self.features(images) for images in made])
        arrays |= joined([self.pairs(one, other) for one, other in zip(made, originals, strict=True)])
        if counts := [histogram for histogram in histograms if histogram is not None]:
            arrays[HISTOGRAM] = torch.stack(counts).sum(dim=0).numpy()
        return Later(partial(write_job, job.folder, job.name, pack(**arrays)))


def reconstruction_jobs(
    autoencoder: Artifact,
    parts: Sequence[ShardImages],
    config: PairsConfig,
    *,
    pool: Pool,
    progress: Callable[[int, int], None],
    anew: Store | None,
) -> list[FeatureJob]:
    """Measures reconstructions into files beside the autoencoder; arguments as in `finish_features`."""
    folder, facts = autoencoder.store.join(FEATURES), (autoencoder.digest, *config.facts(), *config.paired())
    jobs = [feature_job(part, *facts)._replace(folder=folder) for part in parts]
    worker = partial(ReconstructionMeasurer, autoencoder, config)
    finish_features(worker, jobs, pool=pool, progress=progress, anew=anew)
    return jobs


def kept_histogram(jobs: Sequence[FeatureJob]) -> Tensor | None:
    """Counts of each code over all finished jobs, (K,); None without codes. Runs in a worker."""
    files = [read_arrays(job.folder, job.name) for job in jobs]
    counts = [torch.from_numpy(arrays[HISTOGRAM]) for arrays in files if HISTOGRAM in arrays]
    return torch.stack(counts).sum(dim=0) if counts else None


@torch.inference_mode()
def reconstruct(network: Autoencoder, images: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
    """Images (N, H, W, 3) uint8 through codes or a Gaussian's mean and back, at the network's resolution.
    Returns the reconstructions, uint8 (N, H, W, 3), and how often each code occurs, (K,) int64, if there are codes."""
    device, made, codes = next(network.parameters()).device, [], []
    for part in torch.from_numpy(images).split(most_at_once(network.resolution)):
        encoded = network.encode(from_uint8(part.to(device)))
        made.append(to_uint8(network.decode(encoded.z)))
        codes += [] if encoded.indices is None else [encoded.indices]
    histogram = codebook_histogram(torch.cat(codes), codebook_size=network.codebook_size).cpu() if codes else None
    return np.concatenate(made), histogram


def draw_kept(autoencoder: Artifact, parts: Sequence[ShardImages]) -> dict[str, bytes]:
    """The first images of the parts with reconstructions, and index grids of the codes: PNG by name.
    Index grids are drawn only for an autoencoder with codes. Runs in a worker."""
    network = open_autoencoder(autoencoder).to(best_device())
    batches = (images for part in parts for images in part.batches())
    originals = np.concatenate(list(islice(batches, RECONSTRUCTIONS)))[:RECONSTRUCTIONS]
    made, histogram = reconstruct(network, originals)
    drawn = {ORIGINALS: draw_reconstructions(originals, made)}
    if histogram is not None:
        drawn[INDEX_GRIDS] = draw_index_grids(originals, to_uint8(index_grids(network, originals[:GRIDS])), made)
    return drawn
