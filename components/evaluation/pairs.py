"""Reconstructions beside their originals, pair by pair: PSNR, SSIM and LPIPS, and rFID.

`rfid` is the Fréchet distance of the reconstructions to the same originals, in features. A figure's name has its N.

Shapes: N images, H W their pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from components.configuration.config import Since, refuse
from components.evaluation.features import (
    FeatureJob,
    FeatureSet,
    MeasureConfig,
    RowMeasurer,
    measure_features,
    read_arrays,
)
from components.evaluation.image_sets import HELD_OUT, ImageSet
from components.evaluation.metrics import counted, published_name
from components.models.losses.reconstruction import psnr, ssim
from components.runtime.storage.store import absolute, digest_of, read_url
from components.sampling.device import best_device
from components.sampling.images import from_uint8
from components.weights.perceptual import load_perceptual_loss

PairedMetric = Literal["rfid", "psnr", "ssim", "lpips"]
TITLES = {"lpips": "lpips_vgg16"}  # in names of figures


class PairsConfig(MeasureConfig):
    """Figures of reconstructions beside their originals, with the settings of distances."""

    pairs: Annotated[tuple[PairedMetric, ...], Since(())] = ()
    lpips_weights: Annotated[str | None, Since(None)] = None  # URI: VGG-16's features.* and LPIPS's lin*.model.1.weight

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
        pixels = [from_uint8(images).to(self.device) for images in (made, originals)] if "lpips" in self.names else []
        given = {name: pixels if name == "lpips" else levels for name in self.names}
        return {name: self.measures[name](*given[name]).double().cpu().numpy() for name in self.names}


def mean_figures(kept: Sequence[FeatureJob], config: PairsConfig) -> dict[str, float]:
    """The mean of each figure of pairs over all finished jobs, by name with N. Runs in a worker."""
    parts = [read_arrays(job.folder, job.name) for job in kept]
    values = {name: np.concatenate([part[name] for part in parts]) for name in config.by_pair}
    return {f"{TITLES.get(name, name)}_{counted(len(each))}": float(each.mean()) for name, each in values.items()}


def measure_pairs(
    config: PairsConfig, originals: ImageSet, kept: Sequence[FeatureJob], work: Mapping[str, Any]
) -> dict[str, float]:
    """Figures of reconstructions beside their originals, as `psnr_1024` and `rfid_inception_1024`.

    Args:
        kept: finished jobs of the reconstructions.
        work: as for `measure_features`.
    """
    pool, figures = work["pool"], work["pool"].call(partial(mean_figures, kept, config))
    if "rfid" in config.pairs:
        (reference,) = measure_features({HELD_OUT: originals}, config, **work)
        made = FeatureSet("reconstructions", "model", tuple(kept))
        (row,) = pool.map(partial(RowMeasurer, reference, seed=config.seed, metrics=()), [made])
        figures[f"r{published_name('distance', config.feature_network, row.samples)}"] = row.distance
    return figures
