"""Published diffusion models as recipes that run: give them images and a cluster.

cascade run --recipe adm_imagenet_64_256 --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from typing import NamedTuple

from components.configuration.sampling import (
    ClassifierSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import Column, PrecomputeConfig
from components.stages.restoration import RestorationConfig
from components.stages.samples import SamplesConfig
from components.stages.text_encoder import TextEncoderConfig
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, ImageToImageRecipe
from pipelines.recipes.paper_autoencoders import AUTOENCODERS
from pipelines.recipes.paper_classifiers import PAPER_CLASSIFIERS
from pipelines.recipes.paper_diffusion import PAPER_DIFFUSION

ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=250)  # of IDDPM, ADM, GLIDE
ANCESTRAL_1000 = DiffusionSampling(sampler="ddpm", num_inference_steps=1000)  # of DDPM, Palette
LATENT = DiffusionSampling(sampler="ddim", num_inference_steps=200, threshold="none")  # of LDM

PUBLISHED_SAMPLES = SamplesConfig(measured_samples=50_000)  # of all systems that state a distance here
PUBLISHED_EVALUATION = EvaluationConfig(reference_samples=50_000, held_out_samples=10_000)


class PaperBranch(NamedTuple):
    """A row of the table: models by their names in the tables of their own, and how they are sampled."""

    summary: str
    resolution: int  # pixels of the images
    base: str
    sampling: DiffusionSampling  # of the base
    classifier: str | None = None
    scale: float = 1.0  # of the classifier's guidance
    upsampler: str | None = None
    enlarging: DiffusionSampling | None = None  # sampling of the upsampler
    autoencoder: str | None = None
    text_encoder: TextEncoderConfig | None = None
    vocab_size: int = 1024
    text_length: int = 16


# fmt: off
PAPER_BRANCHES: dict[str, PaperBranch] = {
    # side, base, sampling; classifier, its scale; upsampler, its sampling
    "ddpm_cifar_10": PaperBranch("DDPM on CIFAR-10, 32².", 32, "ddpm_cifar_10", ANCESTRAL_1000),
    "iddpm_imagenet_64": PaperBranch("Improved DDPM on ImageNet, 64².", 64, "iddpm_imagenet_64", ANCESTRAL),
    "adm_imagenet_64_256": PaperBranch(
        "ADM at 64², guided by its classifier at scale 1, and its upsampler to 256² (ADM-G, ADM-U).",
        256, "adm_imagenet_64", ANCESTRAL, "adm_classifier_64", 1.0, "adm_upsampler_64_256", ANCESTRAL),
    "adm_imagenet_128_512": PaperBranch(
        "ADM at 128², guided by its classifier at scale 0.5, and its upsampler to 512² (ADM-G, ADM-U).",
        512, "adm_imagenet_128", ANCESTRAL, "adm_classifier_128", 0.5, "adm_upsampler_128_512", ANCESTRAL),
    "adm_imagenet_256": PaperBranch(
        "ADM at 256² in one model, guided by its classifier at scale 1.",
        256, "adm_imagenet_256", ANCESTRAL, "adm_classifier_256", 1.0),
    "adm_imagenet_256_unconditional": PaperBranch(
        "ADM at 256² that knows no class, guided by the classifier alone at scale 10.",
        256, "adm_imagenet_256_unconditional", ANCESTRAL, "adm_classifier_256", 10.0),
    "adm_imagenet_512": PaperBranch(
        "ADM at 512² in one model, guided by its classifier at scale 4.",
        512, "adm_imagenet_512", ANCESTRAL, "adm_classifier_512", 4.0),
    "cdm_imagenet_64_256": PaperBranch(
        "CDM: an upsampler to 256² with conditioning augmentation. ADM's base stands in for that of the paper.",
        256, "adm_imagenet_64", ANCESTRAL,
        upsampler="cdm_upsampler_64_256", enlarging=ANCESTRAL.replace(noise_level=200)),
    "glide_64_256": PaperBranch(
        "GLIDE by text, 64² and its upsampler to 256². A vocabulary of 50,257 words, texts of 128.",
        256, "glide_base", ANCESTRAL.replace(guidance_scale=3.0),
        upsampler="glide_upsampler", enlarging=ANCESTRAL.replace(num_inference_steps=27),
        vocab_size=50_257, text_length=128),
    "ldm_ffhq_f4": PaperBranch(
        "Latent diffusion on faces, 256², in the latents of vq-f4.",
        256, "ldm_ffhq_f4", LATENT, autoencoder="ldm_vq_f4"),
    "ldm_imagenet_f8": PaperBranch(
        "Latent diffusion by class, 256², in the latents of vq-f8.",
        256, "ldm_imagenet_f8", LATENT, autoencoder="ldm_vq_f8"),
    "ldm_imagenet_f4": PaperBranch(
        "Latent diffusion by class, 256², in the latents of vq-f4.",
        256, "ldm_imagenet_f4", LATENT.replace(guidance_scale=1.5), autoencoder="ldm_vq_f4"),
    "ldm_text_to_image": PaperBranch(
        "Latent diffusion by text, 256², in the latents of kl-f8; any encoder with 77 states of 1,280 features a text.",
        256, "ldm_text_to_image", LATENT.replace(guidance_scale=5.0), autoencoder="ldm_kl_f8",
        text_encoder=TextEncoderConfig(uri="s3://your-bucket/text-encoder", length=77)),
}
# fmt: on


def diffusion_branch(name: str, row: PaperBranch) -> DiffusionBranchRecipe:
    """The recipe of a row, on images of the user's own."""
    guide = None if row.classifier is None else ClassifierSampling(guidance_scale=row.scale)
    enlarging = () if row.enlarging is None else (row.enlarging,)
    return DiffusionBranchRecipe(
        name=name,
        images=images(resolution=row.resolution, vocab_size=row.vocab_size, text_length=row.text_length),
        autoencoder=None if row.autoencoder is None else AUTOENCODERS[row.autoencoder].training,
        text_encoder=row.text_encoder,
        precompute=frozen_work(row),
        base=PAPER_DIFFUSION[row.base],
        classifier=None if row.classifier is None else PAPER_CLASSIFIERS[row.classifier],
        upsamplers=() if row.upsampler is None else (PAPER_DIFFUSION[row.upsampler],),
        sampling=DiffusionBranchSampling(base=row.sampling, classifier=guide, upsamplers=enlarging),
        samples=PUBLISHED_SAMPLES,
        evaluation=PUBLISHED_EVALUATION,
    )


def frozen_work(row: PaperBranch) -> PrecomputeConfig | None:
    """What frozen networks make of the images and captions, made once and read by the base at each step; None where
    there are none. Of the images only thumbnails of the latents' side are kept.

    A sample of `ldm_text_to_image` has 16 kB of latents and 394 kB of states: where a set is seen about once that is
    the storage of states for little, and `--set 'precompute.columns=[latents]'` makes them at each step.
    """
    columns: dict[Column, object] = {"latents": row.autoencoder, "text_states": row.text_encoder}
    made = tuple(column for column, maker in columns.items() if maker is not None)
    kept = PAPER_DIFFUSION[row.base].data.resolution
    return PrecomputeConfig(columns=made, resolution=row.resolution, kept_resolution=kept) if made else None


def palette_256() -> ImageToImageRecipe:
    """Palette at 256², one model for inpainting, uncropping, colorization, JPEG and super-resolution."""
    return ImageToImageRecipe(
        name="palette_256",
        images=images(resolution=256),
        model=PAPER_DIFFUSION["palette"],
        sampling=RestorationSampling(model=ANCESTRAL_1000),
        restoration=RestorationConfig(samples=1000),
    )


def images(*, resolution: int, vocab_size: int = 1024, text_length: int = 16) -> ImagesConfig:
    """Images of the user's own; one percent is held out."""
    return ImagesConfig(
        source="s3://your-bucket/images/*.tar",
        resolution=resolution,
        samples_per_shard=1024,
        holdout_fraction=0.01,
        vocab_size=vocab_size,
        text_length=text_length,
    )
