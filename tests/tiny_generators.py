"""Tiny models of every generator but diffusion, with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.sampling.cascade import compose
from components.sampling.image_files import encode_png
from tests.tiny_cascade import CLASSES, DIFFUSION, FEW, TOKENIZER, UNET, write_model

CONDITION = {**TOKENIZER, "bottleneck": {**TOKENIZER["bottleneck"], "codebook_size": 8}}
PIXELS = {"num_channels": 3, "channels": 6, "num_layers": 1, "kernel_size": 3, "num_classes": 3}
SIZE = {"resolution": 4, "classes": CLASSES}
PLAIN = {"codebook_size": 32, "num_tokens": 16, "grid": [4, 4], "model_dim": 16, "num_layers": 1, "num_heads": 2}
GRID = {"grid": [4, 4], "classes": CLASSES}
LONE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pixels": ("pixelcnn", {**PIXELS, "num_values": 256, "embedding": "intensity"}, SIZE),
    "gan": ("gan", {"resolution": 8, "channels": 4, "channel_mult": [1, 2], "noise_dim": 4, "num_classes": 3}, SIZE),
    "vae": ("autoencoder", {**TOKENIZER, "bottleneck": {"kind": "gaussian"}}, {"resolution": 16}),
}
PRIORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "transformer": ("transformer", {**PLAIN, "num_classes": 3, "positions": "rotary_2d"}, GRID),
    "masked": ("masked_transformer", {**PLAIN, "num_classes": 3}, GRID),
    "pixelcnn": ("pixelcnn", {**PIXELS, "num_channels": 1, "num_values": 32, "embedding": "table"}, GRID),
    "row_lstm": ("row_lstm", {**PIXELS, "num_channels": 1, "num_values": 32, "embedding": "table"}, GRID),
}


def write(folder: Path, kind: str, network: dict[str, Any], settings: dict[str, Any]) -> Path:
    torch.manual_seed(1)
    module = NETWORKS[kind](**network)
    for parameter in module.parameters():
        torch.nn.init.normal_(
            parameter, std=1.0 if "transformer" in kind else 0.3
        )  # conditions must be felt in 16 tokens
    save_bundle(folder, ModelBundle(kind, network, settings, module))
    return folder


def lone(generator: str, folder: Path) -> Path:
    """A cascade of nothing but a model of this generator."""
    return compose(folder / "cascade", model=write(folder / "m", *LONE[generator]))


def token_branch(prior: tuple[str, dict[str, Any], dict[str, Any]], folder: Path, **parts: Path) -> Path:
    """A cascade of a tokenizer and a prior."""
    tokenizer = write(folder / "t", "autoencoder", TOKENIZER, {"resolution": 16})
    sampling = {"prior": {"num_inference_steps": 4}} if prior[0] == "masked_transformer" else {}
    written = {"tokenizer": tokenizer, "prior": write(folder / "p", *prior), **parts}
    return compose(folder / "cascade", **written, sampling=sampling)


def conditioned(folder: Path) -> Path:
    """A prior after the tokens of a condition image."""
    network = {**PLAIN, "condition_codebook_size": 8, "condition_grid": [4, 4]}
    seen = write(folder / "c", "autoencoder", CONDITION, {"resolution": 16, "member": "depth"})
    return token_branch(("transformer", network, GRID), folder, condition=seen)


def by_depth(folder: Path) -> Path:
    """A diffusion model of 8² by class and a depth map."""
    network = UNET | {"resolution": 8, "text": None, "condition_image_channels": 3}
    settings = DIFFUSION | {"role": "base", "resolution": 8, "condition_member": "depth"}
    base = write_model(folder / "depth", "unet", network, settings)
    return compose(folder / "cascade", base=base, sampling={"base": FEW})


def depth(edge: int, side: int = 8) -> bytes:
    """A depth map with an edge."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, edge:] = 200
    return encode_png(pixels)
