"""Published diffusion models as recipes that run: give them images and a cluster.

cascade run --recipe adm_imagenet_64_256 --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from collections.abc import Callable
from typing import Any

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import (
    ClassifierSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.restoration import RestorationConfig
from components.stages.samples import SamplesConfig
from components.stages.text_encoder import TextEncoderConfig
from pipelines.diffusion_branch import DiffusionBranchRecipe
from pipelines.image_to_image import ImageToImageRecipe
from pipelines.recipes import paper_classifiers, paper_diffusion
from pipelines.recipes.paper_autoencoders import ldm_kl_f8, ldm_vq_f4, ldm_vq_f8

SOURCE = "s3://your-bucket/images/*.tar"
TEXT_ENCODER = "s3://your-bucket/text-encoder"
ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=250)  # of IDDPM, ADM, GLIDE
ANCESTRAL_1000 = DiffusionSampling(sampler="ddpm", num_inference_steps=1000)  # of DDPM, Palette
LATENT = DiffusionSampling(sampler="ddim", num_inference_steps=200, threshold="none")  # of LDM


def ddpm_cifar_10() -> DiffusionBranchRecipe:
    """DDPM on CIFAR-10, 32²."""
    return branch("ddpm_cifar_10", paper_diffusion.ddpm_cifar_10(), ANCESTRAL_1000, resolution=32)


def iddpm_imagenet_64() -> DiffusionBranchRecipe:
    """Improved DDPM on ImageNet, 64²."""
    return branch("iddpm_imagenet_64", paper_diffusion.iddpm_imagenet_64(), ANCESTRAL, resolution=64)


def adm_imagenet_64_256() -> DiffusionBranchRecipe:
    """ADM at 64², guided by its classifier at scale 1, and its upsampler to 256² (ADM-G, ADM-U)."""
    return branch(
        "adm_imagenet_64_256",
        paper_diffusion.adm_imagenet_64(),
        ANCESTRAL,
        guide=1.0,
        larger=(ANCESTRAL,),
        classifier=paper_classifiers.adm_classifier_64(),
        upsamplers=(paper_diffusion.adm_upsampler_64_256(),),
        resolution=256,
    )


def adm_imagenet_128_512() -> DiffusionBranchRecipe:
    """ADM at 128², guided by its classifier at scale 0.5, and its upsampler to 512² (ADM-G, ADM-U)."""
    return branch(
        "adm_imagenet_128_512",
        paper_diffusion.adm_imagenet_128(),
        ANCESTRAL,
        guide=0.5,
        larger=(ANCESTRAL,),
        classifier=paper_classifiers.adm_classifier_128(),
        upsamplers=(paper_diffusion.adm_upsampler_128_512(),),
        resolution=512,
    )


def adm_imagenet_256() -> DiffusionBranchRecipe:
    """ADM at 256² in one model, guided by its classifier at scale 1."""
    base, classifier = paper_diffusion.adm_imagenet_256(), paper_classifiers.adm_classifier_256()
    return branch("adm_imagenet_256", base, ANCESTRAL, guide=1.0, classifier=classifier, resolution=256)


def adm_imagenet_256_unconditional() -> DiffusionBranchRecipe:
    """ADM at 256² that knows no class, guided by the classifier alone at scale 10."""
    base, classifier = paper_diffusion.adm_imagenet_256_unconditional(), paper_classifiers.adm_classifier_256()
    return branch("adm_imagenet_256_unconditional", base, ANCESTRAL, guide=10.0, classifier=classifier, resolution=256)


def adm_imagenet_512() -> DiffusionBranchRecipe:
    """ADM at 512² in one model, guided by its classifier at scale 4."""
    base, classifier = paper_diffusion.adm_imagenet_512(), paper_classifiers.adm_classifier_512()
    return branch("adm_imagenet_512", base, ANCESTRAL, guide=4.0, classifier=classifier, resolution=512)


def cdm_imagenet_64_256() -> DiffusionBranchRecipe:
    """CDM: an upsampler to 256² with conditioning augmentation. ADM's base stands in for that of the paper."""
    return branch(
        "cdm_imagenet_64_256",
        paper_diffusion.adm_imagenet_64(),
        ANCESTRAL,
        upsamplers=(paper_diffusion.cdm_upsampler_64_256(),),
        larger=(ANCESTRAL.replace(noise_level=200),),
        resolution=256,
    )


def glide_64_256() -> DiffusionBranchRecipe:
    """GLIDE by text, 64² and its upsampler to 256². A vocabulary of 50,257 words, texts of 128."""
    return branch(
        "glide_64_256",
        paper_diffusion.glide_base(),
        ANCESTRAL.replace(guidance_scale=3.0),
        larger=(ANCESTRAL.replace(num_inference_steps=27),),
        upsamplers=(paper_diffusion.glide_upsampler(),),
        resolution=256,
        vocab_size=50_257,
        text_length=128,
    )


def ldm_ffhq_f4() -> DiffusionBranchRecipe:
    """Latent diffusion on faces, 256², in the latents of vq-f4."""
    return branch("ldm_ffhq_f4", paper_diffusion.ldm_ffhq_f4(), LATENT, autoencoder=ldm_vq_f4(), resolution=256)


def ldm_imagenet_f8() -> DiffusionBranchRecipe:
    """Latent diffusion by class, 256², in the latents of vq-f8."""
    return branch("ldm_imagenet_f8", paper_diffusion.ldm_imagenet_f8(), LATENT, autoencoder=ldm_vq_f8(), resolution=256)


def ldm_imagenet_f4() -> DiffusionBranchRecipe:
    """Latent diffusion by class, 256², in the latents of vq-f4."""
    sampling = LATENT.replace(guidance_scale=1.5)
    return branch(
        "ldm_imagenet_f4", paper_diffusion.ldm_imagenet_f4(), sampling, autoencoder=ldm_vq_f4(), resolution=256
    )


def ldm_text_to_image() -> DiffusionBranchRecipe:
    """Latent diffusion by text, 256², in the latents of kl-f8; any encoder with 77 states of 1,280 features a text."""
    return branch(
        "ldm_text_to_image",
        paper_diffusion.ldm_text_to_image(),
        LATENT.replace(guidance_scale=5.0),
        autoencoder=ldm_kl_f8(),
        text_encoder=TextEncoderConfig(uri=TEXT_ENCODER, length=77),
        resolution=256,
    )


def palette_256() -> ImageToImageRecipe:
    """Palette at 256², one model for inpainting, uncropping, colorization, JPEG and super-resolution."""
    return ImageToImageRecipe(
        name="palette_256",
        images=images(resolution=256),
        model=paper_diffusion.palette(),
        sampling=RestorationSampling(model=ANCESTRAL_1000),
        restoration=RestorationConfig(samples=1000),
    )


PAPER_BRANCHES: tuple[Callable[[], DiffusionBranchRecipe], ...] = (
    ddpm_cifar_10,
    iddpm_imagenet_64,
    adm_imagenet_64_256,
    adm_imagenet_128_512,
    adm_imagenet_256,
    adm_imagenet_256_unconditional,
    adm_imagenet_512,
    cdm_imagenet_64_256,
    glide_64_256,
    ldm_ffhq_f4,
    ldm_imagenet_f8,
    ldm_imagenet_f4,
    ldm_text_to_image,
)


def branch(
    name: str,
    base: DiffusionTraining,
    sampling: DiffusionSampling,
    *,
    resolution: int,
    guide: float | None = None,
    larger: tuple[DiffusionSampling, ...] = (),
    vocab_size: int = 1024,
    text_length: int = 16,
    **parts: Any,
) -> DiffusionBranchRecipe:
    """A recipe on images of the user's own.

    Args:
        sampling: of the base.
        guide: scale of the classifier that guides it.
        larger: of the upsamplers.
    """
    classifier = None if guide is None else ClassifierSampling(guidance_scale=guide)
    return DiffusionBranchRecipe(
        name=name,
        images=images(resolution=resolution, vocab_size=vocab_size, text_length=text_length),
        base=base,
        sampling=DiffusionBranchSampling(base=sampling, classifier=classifier, upsamplers=larger),
        samples=SamplesConfig(measured_samples=10_000),
        evaluation=EvaluationConfig(held_out_samples=10_000),
        **parts,
    )


def images(*, resolution: int, vocab_size: int = 1024, text_length: int = 16) -> ImagesConfig:
    """Images of the user's own; one percent is held out."""
    return ImagesConfig(
        source=SOURCE,
        resolution=resolution,
        samples_per_shard=1024,
        holdout_fraction=0.01,
        vocab_size=vocab_size,
        text_length=text_length,
    )
