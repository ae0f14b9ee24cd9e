"""PSNR, SSIM and LPIPS of pairs equal the formulas and programs of others; one line for missing weights."""

import math
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from components.configuration.usage import UsageError
from components.evaluation.reconstructions import PairMeasurer, PairsConfig
from components.runtime.storage.store import digest_of
from components.sampling.device import best_device
from pipelines.planning.preflight import Needs, check_needs
from pipelines.recipes.catalog import load_recipe
from tests.feature_weights import lpips_network, write_lpips
from tests.refusals import one_line

RNG = np.random.default_rng(0)
ORIGINALS = gaussian_filter(RNG.uniform(0, 255, (3, 20, 27, 3)), (0, 2, 2, 0)).round().astype(np.uint8)
MADE = (ORIGINALS + RNG.normal(0, 9, ORIGINALS.shape)).clip(0, 255).round().astype(np.uint8)


def scipys_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Of one image, with scipy's filter: radius 5 for sigma 1.5, and its edges left out."""

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma=1.5, truncate=3.5)[5:-5, 5:-5]

    found = []
    for channel in range(3):
        x, y = (image[..., channel].astype(float) for image in (one, other))
        ux, uy = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - ux**2, mean(y * y) - uy**2, mean(x * y) - ux * uy
        c1, c2 = 2.55**2, 7.65**2
        found.append((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_psnr_and_ssim_of_each_pair_are_those_of_the_papers() -> None:
    found = PairMeasurer(PairsConfig(pairs=("ssim", "psnr", "rfid")))(MADE, ORIGINALS)
    assert list(found) == ["ssim", "psnr"]
    errors = ((MADE.astype(float) - ORIGINALS) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found["psnr"], 20 * math.log10(255) - 10 * np.log10(errors), rtol=1e-9)
    expected = [scipys_ssim(*pair) for pair in zip(MADE, ORIGINALS, strict=True)]
    np.testing.assert_allclose(found["ssim"], expected, rtol=1e-9)
    same = PairMeasurer(PairsConfig(pairs=("ssim", "psnr")))(ORIGINALS, ORIGINALS)
    np.testing.assert_allclose(same["ssim"], 1)
    assert np.isfinite(same["psnr"]).all()
    with one_line(ValueError, "ssim needs images of at least 11 pixels"):
        PairMeasurer(PairsConfig(pairs=("ssim",)))(MADE[:, :8], ORIGINALS[:, :8])


def test_lpips_is_torch_fidelitys_own(tmp_path: Path) -> None:
    theirs = lpips_network()
    path = write_lpips(tmp_path / "lpips.safetensors", theirs)
    config = PairsConfig(pairs=("lpips", "psnr"), lpips_weights=str(path))
    made, originals = (images.repeat(2, axis=1).repeat(2, axis=2) for images in (MADE, ORIGINALS))
    with torch.inference_mode():
        given = [torch.from_numpy(images).permute(0, 3, 1, 2).to(best_device()) for images in (made, originals)]
        expected = theirs.to(best_device())(*given).flatten().cpu()
    found = PairMeasurer(config)(made, originals)
    np.testing.assert_allclose(found["lpips"], expected, rtol=1e-4)
    assert found["lpips"].min() > 0.01
    assert config.paired() == ("lpips", "psnr", digest_of(path).sha256)


def test_missing_weights_are_one_line_before_anything_starts() -> None:
    with one_line(UsageError, "lpips needs lpips_weights"):
        load_recipe("openmoji", ["evaluation.pairs=[lpips]"])
    with one_line(UsageError, "rfid needs a feature_network"):
        load_recipe("openmoji", ["evaluation.pairs=[rfid]", "evaluation.feature_network=none"])
    config = load_recipe("openmoji", ["evaluation.pairs=[lpips]", "evaluation.lpips_weights=none.st"]).evaluation
    with one_line(UsageError, r"none\.st can't be used .*lin\*\.model\.1\.weight"):
        check_needs(Needs((config,)))
    assert Needs((config,)).addresses() == ["none.st"]
