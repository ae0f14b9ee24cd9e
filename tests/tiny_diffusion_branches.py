"""Cascades of what stands around a base, tiny and with random weights: latents, frozen encoders, a classifier."""

from pathlib import Path
from typing import Any

from components.sampling.cascade import compose
from tests.tiny_cascade import CLASSES, DIFFUSION, FEW, SAMPLING, TEXT, TEXT_LENGTH, UNET, UPSAMPLER, write_model
from tests.tiny_generators import LONE

CLASSIFIER = {"resolution": 8, "num_classes": len(CLASSES), "model_channels": 8, "channel_mult": [1, 2]}
CLASSIFIER |= {"num_res_blocks": 1, "attention_resolutions": [4], "head_dim": 8}
CONTRASTIVE = {"resolution": 8, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "patch_size": 2}
CONTRASTIVE |= {"embedding_dim": 6, "text": TEXT}
PRIOR = {"embedding_dim": 6, "text_length": TEXT_LENGTH, "text_dim": TEXT["model_dim"]}
PRIOR |= {"model_dim": 16, "num_layers": 1, "num_heads": 2}
PRIOR_SETTINGS = DIFFUSION | {"role": "diffusion_prior"}
PRIOR_SAMPLING = FEW | {"guidance_scale": 1.5, "candidates": 2}
DIT = {"patch_size": 2, "model_dim": 16, "num_layers": 1, "num_heads": 2, "num_classes": len(CLASSES)}
LATENT_SCALE = 0.25


def base(folder: Path, *, settings: dict[str, Any] | None = None, **network: Any) -> Path:
    """A base of 8² that knows nothing but what `network` says."""
    about = DIFFUSION | {"role": "base", "resolution": 8} | (settings or {})
    return write_model(
        folder / "base", "unet", UNET | {"resolution": 8, "num_classes": None, "text": None} | network, about
    )


def contrastive(folder: Path) -> Path:
    return write_model(folder / "contrastive", "contrastive", CONTRASTIVE, {"role": "contrastive", "resolution": 8})


def classifier(folder: Path, network: dict[str, Any] | None = None, **settings: Any) -> Path:
    about = {"role": "classifier", "resolution": 8, "noisy": True, "classes": CLASSES}
    about |= {"objective": DIFFUSION["objective"]} | settings
    return write_model(folder / "classifier", "classifier", CLASSIFIER | (network or {}), about)


def latent(folder: Path, **parts: Path) -> Path:
    """Latents of 4² of a VAE of 16² images, by class."""
    sizes = {"resolution": 4, "in_channels": 8, "out_channels": 8, "num_classes": len(CLASSES)}
    settings = {"resolution": 4, "latent_scale": LATENT_SCALE}
    made, sampling = base(folder, settings=settings, **sizes), {"base": FEW | {"threshold": "none"}}
    return compose(
        folder / "cascade", autoencoder=write_model(folder / "vae", *LONE["vae"]), base=made, sampling=sampling, **parts
    )


def guided_in_latents(folder: Path, scale: float = LATENT_SCALE) -> Path:
    """The same, pulled towards the class by a classifier of noisy latents."""
    network = {"resolution": 4, "in_channels": 8, "attention_resolutions": [2]}
    return latent(folder, classifier=classifier(folder, network, resolution=4, latent_scale=scale))


def imagen(folder: Path) -> Path:
    """Images by the states of a contrastive encoder, which an upsampler sees too."""
    how = {"text_conditioning": "cross_attention", "text_states_dim": TEXT["model_dim"]}
    network = UNET | how | {"resolution": 16, "num_classes": None, "text": None, "low_res": True}
    larger = write_model(folder / "upsampler_16", "unet", network, DIFFUSION | UPSAMPLER)
    parts = {"contrastive": contrastive(folder), "base": base(folder, **how)}
    return compose(folder / "cascade", **parts, upsamplers={"upsampler_16": larger}, sampling=SAMPLING)


def dalle2(folder: Path) -> Path:
    """Images by an embedding that a diffusion prior makes of a text."""
    prior = write_model(folder / "diffusion_prior", "diffusion_prior", PRIOR, PRIOR_SETTINGS)
    parts = {"contrastive": contrastive(folder), "diffusion_prior": prior}
    sampling = {"base": FEW, "diffusion_prior": PRIOR_SAMPLING}
    return compose(folder / "cascade", **parts, base=base(folder, image_embedding_dim=6), sampling=sampling)


def classifier_guided(folder: Path) -> Path:
    """Images by class, pulled towards it by a classifier."""
    parts = {"classifier": classifier(folder), "base": base(folder, num_classes=len(CLASSES))}
    return compose(folder / "cascade", **parts, sampling={"base": FEW})


def guided_by_the_classifier_alone(folder: Path) -> Path:
    """The base knows no class."""
    return compose(folder / "cascade", classifier=classifier(folder), base=base(folder), sampling={"base": FEW})


def autoguided(folder: Path) -> Path:
    """Images by class, away from what a narrower model would make."""
    about, sampling = DIFFUSION | {"role": "base", "resolution": 8}, {"base": FEW | {"autoguidance_scale": 3.0}}
    network = UNET | {"resolution": 8, "model_channels": 4, "text": None}
    weaker = write_model(folder / "weaker", "unet", network, about)
    strong = base(folder, num_classes=len(CLASSES))
    return compose(folder / "cascade", base=strong, weaker=weaker, sampling=sampling)


GENERATORS = {
    "latent": latent,
    "guided_in_latents": guided_in_latents,
    "imagen": imagen,
    "dalle2": dalle2,
    "classifier_guided": classifier_guided,
    "autoguided": autoguided,
    "guided_by_the_classifier_alone": guided_by_the_classifier_alone,
}
