"""Published systems at full size, as recipes for the user's images and cluster.

cascade run --recipe imagenet_class_prior --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from components.configuration.sampling import (
    ClassifierSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    RestorationSampling,
    TransformerSampling,
)
from components.configuration.trainings import PriorTraining
from components.evaluation.restoration import RestorationConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import Column, PrecomputeConfig, TextEncoderConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, ImageToImageRecipe
from pipelines.recipes.published_networks import (
    AUTOENCODERS,
    CHECKPOINT_MINUTES,
    PAPER_CLASSIFIERS,
    PAPER_DIFFUSION,
    PaperAutoencoder,
)
from pipelines.recipes.shapes import OneModelRecipe, SharedParts, TokenBranchRecipe

PaperRecipe = Callable[[], OneModelRecipe | TokenBranchRecipe | DiffusionBranchRecipe | ImageToImageRecipe]

ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=250)  # of IDDPM, ADM, GLIDE
ANCESTRAL_1000 = DiffusionSampling(sampler="ddpm", num_inference_steps=1000)  # of DDPM, Palette
LATENT = DiffusionSampling(sampler="ddim", num_inference_steps=200, threshold="none")  # of LDM


class PaperPrior(NamedTuple):
    """A row of the table: a transformer over the tokens of an autoencoder."""

    summary: str
    tokenizer: str  # in the table of published autoencoders
    training: PriorTraining
    sampling: TransformerSampling
    vocab_size: int = 1024
    text_length: int = 16


class PaperBranch(NamedTuple):
    """A row of the table: models by name, and sampling settings."""

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
PRIORS: dict[str, PaperPrior] = {
    # Esser et al. (2021), table 4 ("cin256"): 48 layers, 24 heads, width 1,536, AdamW (0.9, 0.95), weight decay 0.01;
    # learning rate 4.5e-6 for each image of the batch. Batch and steps are ours.
    "imagenet_class_prior": PaperPrior(
        "Class-conditional ImageNet of taming-transformers: 16² tokens of 16,384 codes, a transformer of 1.4 billion.",
        "vqgan_imagenet_f16_16384",
        PriorTraining.of(
            model_dim=1536, num_heads=24, num_layers=48, conditions=("label",), total_steps=1_000_000,
            global_batch_size=64, learning_rate=64 * 4.5e-6, betas=(0.9, 0.95), weight_decay=0.01),
        TransformerSampling(top_k=600, top_p=0.92)),
    # kakaobrain/minDALL-E, `configs/dalle_1.3B.yaml`: 42 layers, 24 heads, width 1,536, text vocabulary 16,384;
    # DALL-E's weights of the two likelihoods, 1/8 and 7/8 (Ramesh et al., 2021). Batch, rate and steps are ours.
    "mindalle_text_prior": PaperPrior(
        "minDALL-E: 64 text and 16² image tokens in one transformer of 1.3 billion, over a VQ-GAN of 16,384 codes.",
        "vqgan_imagenet_f16_16384",
        PriorTraining.of(
            model_dim=1536, num_heads=24, num_layers=42, conditions=("text",), text_loss_weight=1 / 8,
            total_steps=500_000, global_batch_size=512, learning_rate=4.5e-4, betas=(0.9, 0.96), weight_decay=0.045),
        TransformerSampling(top_k=256), vocab_size=16_384, text_length=64),
    # Ramesh et al. (2021), section 2.2 and appendix B: 64 layers, 62 heads of 64, 256 text tokens of 16,384 words, row
    # and column positions, dropout 0.1; 430,000 updates of 1,024 pairs, AdamW (0.9, 0.96), weight decay 0.045, rate
    # 4.5e-4 after 5,000 updates, norms clipped at 4, an average of 0.999, temperature 1. Published, the rate is halved
    # five times where the loss stands still: ours falls along a line to the same 1/32. Attention is sparse there (a
    # row, a column or a window) and whole here, so weights are as many and operations more; a pad of a text has a
    # vector for each place there, and is not looked at here.
    "dalle_text_prior": PaperPrior(
        "DALL-E: 256 text and 32² image tokens in one transformer of 12 billion, over its dVAE of 8,192 codes; no GPU "
        "holds its 246 GB, so a profile needs `stages: {prior: {sharding: full}}`.",
        "dalle_dvae_f8_8192",
        PriorTraining.of(
            model_dim=3968, num_heads=62, num_layers=64, conditions=("text",), text_loss_weight=1 / 8,
            total_steps=430_000, global_batch_size=1024, learning_rate=4.5e-4, betas=(0.9, 0.96), weight_decay=0.045,
            positions="learned_2d", dropout=0.1, warmup_steps=5000, max_grad_norm=4.0, final_lr_fraction=1 / 32,
            sample_every=5000, gradient_checkpointing=True),
        TransformerSampling(), vocab_size=16_384, text_length=256),
}

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
def paper_recipes() -> dict[str, PaperRecipe]:
    """Name -> recipe, described by `__doc__` like all recipes."""
    recipes: dict[str, PaperRecipe] = {}
    for table, make in ((AUTOENCODERS, lone_model), (PRIORS, token_branch), (PAPER_BRANCHES, diffusion_branch)):
        for name, row in table.items():
            recipes[name] = partial(make, name, row)
            recipes[name].__doc__ = row.summary
    return recipes | {"palette_256": palette_256}


def lone_model(name: str, row: PaperAutoencoder) -> OneModelRecipe:
    """The recipe of an autoencoder alone."""
    return OneModelRecipe(name=name, images=own_images().images, model=row.training, evaluation=EvaluationConfig())


def token_branch(name: str, row: PaperPrior) -> TokenBranchRecipe:
    """The recipe of a prior and a tokenizer."""
    shared = own_images(vocab_size=row.vocab_size, text_length=row.text_length)
    prior = row.training.replace(precision="bf16", compile_network=True, checkpoint_minutes=CHECKPOINT_MINUTES)
    sampling = row.sampling.replace(compile_decoding=True)
    return shared.token_branch(name, AUTOENCODERS[row.tokenizer].training, prior, sampling)


def diffusion_branch(name: str, row: PaperBranch) -> DiffusionBranchRecipe:
    """The recipe of a row of diffusion."""
    guide = None if row.classifier is None else ClassifierSampling(guidance_scale=row.scale)
    enlarging = () if row.enlarging is None else (row.enlarging,)
    sampling = DiffusionBranchSampling(base=row.sampling, classifier=guide, upsamplers=enlarging)
    return own_images(row.resolution, vocab_size=row.vocab_size, text_length=row.text_length).branch(
        name, PAPER_DIFFUSION[row.base], sampling, text_encoder=row.text_encoder, precompute=frozen_work(row),
        autoencoder=None if row.autoencoder is None else AUTOENCODERS[row.autoencoder].training,
        classifier=None if row.classifier is None else PAPER_CLASSIFIERS[row.classifier],
        upsamplers=() if row.upsampler is None else (PAPER_DIFFUSION[row.upsampler],))


def frozen_work(row: PaperBranch) -> PrecomputeConfig | None:
    """Latents and states of captions, made once by frozen networks; None where a row has none.

    The base reads them at each step; only thumbnails of the latents' side are kept of the images. A sample of
    `ldm_text_to_image` has 16 kB of latents and 394 kB of states: where a set is seen about once that is the storage of
    states for little, and `--set 'precompute.columns=[latents]'` makes them at each step.
    """
    makers: dict[Column, object] = {"latents": row.autoencoder, "text_states": row.text_encoder}
    columns = tuple(column for column, maker in makers.items() if maker is not None)
    side = PAPER_DIFFUSION[row.base].data.resolution
    return PrecomputeConfig(columns=columns, resolution=row.resolution, kept_resolution=side) if columns else None


def palette_256() -> ImageToImageRecipe:
    """Palette at 256², one model for inpainting, uncropping, colorization, JPEG and super-resolution."""
    return ImageToImageRecipe(
        name="palette_256", images=own_images().images, model=PAPER_DIFFUSION["palette"],
        sampling=RestorationSampling(model=ANCESTRAL_1000), restoration=RestorationConfig(samples=1000))


def own_images(resolution: int = 256, *, vocab_size: int = 1024, text_length: int = 16) -> SharedParts:
    """Images of the user's own, 1 % held out; samples and measures of all systems with a distance."""
    images = ImagesConfig(
        source="s3://your-bucket/images/*.tar", resolution=resolution, samples_per_shard=1024, holdout_fraction=0.01,
        vocab_size=vocab_size, text_length=text_length)
    samples = SamplesConfig(measured_samples=50_000)
    return SharedParts(images, samples, EvaluationConfig(reference_samples=50_000, held_out_samples=10_000))
# fmt: on
