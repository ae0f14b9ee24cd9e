"""Published systems at their size, as recipes that run: give them images and a cluster.

Here are those of the discrete branch; diffusion is in `paper_branches.py`.

cascade run --recipe imagenet_class_prior --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from collections.abc import Callable

from components.configuration.sampling import TokenBranchSampling, TokenSampling
from components.configuration.trainings import AutoencoderTraining, PriorTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.samples import SamplesConfig
from pipelines.diffusion_branch import DiffusionBranchRecipe
from pipelines.image_to_image import ImageToImageRecipe
from pipelines.one_model import OneModelRecipe
from pipelines.recipes.paper_autoencoders import (
    dalle_dvae_f8_8192,
    ldm_kl_f4,
    ldm_kl_f8,
    ldm_kl_f16,
    ldm_vq_f4,
    ldm_vq_f8,
    ldm_vq_f16,
    vqgan_imagenet_f16_1024,
    vqgan_imagenet_f16_16384,
    vqvae_imagenet_128,
)
from pipelines.recipes.paper_branches import PAPER_BRANCHES, images, palette_256
from pipelines.token_branch import TokenBranchRecipe

PaperRecipe = Callable[[], OneModelRecipe | TokenBranchRecipe | DiffusionBranchRecipe | ImageToImageRecipe]

AUTOENCODERS: tuple[Callable[[], AutoencoderTraining], ...] = (
    vqgan_imagenet_f16_1024,
    vqgan_imagenet_f16_16384,
    ldm_kl_f4,
    ldm_kl_f8,
    ldm_kl_f16,
    ldm_vq_f4,
    ldm_vq_f8,
    ldm_vq_f16,
    dalle_dvae_f8_8192,
    vqvae_imagenet_128,
)


def imagenet_class_prior() -> TokenBranchRecipe:
    """Class-conditional ImageNet of taming-transformers: 16² tokens of 16,384 codes, a transformer of 1.4 billion.

    Esser et al. (2021), table 4 ("cin256"): 48 layers, 24 heads, width 1,536, AdamW (0.9, 0.95), weight decay 0.01;
    learning rate 4.5e-6 for each image of the batch. Batch and steps are ours.
    """
    prior = PriorTraining.of(
        model_dim=1536,
        num_layers=48,
        num_heads=24,
        conditions=("label",),
        total_steps=1_000_000,
        global_batch_size=64,
        learning_rate=64 * 4.5e-6,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        precision="bf16",
    )
    sampling = TokenSampling(top_k=600, top_p=0.92)
    return token_branch("imagenet_class_prior", prior, sampling, vqgan_imagenet_f16_16384(), text_length=16)


def mindalle_text_prior() -> TokenBranchRecipe:
    """minDALL-E: 64 text and 16² image tokens in one transformer of 1.3 billion, over a VQ-GAN of 16,384 codes.

    kakaobrain/minDALL-E, `configs/dalle_1.3B.yaml`: 42 layers, 24 heads, width 1,536, text vocabulary 16,384; DALL-E's
    weights of the two likelihoods, 1/8 and 7/8 (Ramesh et al., 2021). Batch, rate and steps are ours.
    """
    prior = PriorTraining.of(
        model_dim=1536,
        num_layers=42,
        num_heads=24,
        conditions=("text",),
        text_loss_weight=1 / 8,
        total_steps=500_000,
        global_batch_size=512,
        learning_rate=4.5e-4,
        betas=(0.9, 0.96),
        weight_decay=0.045,
        precision="bf16",
    )
    captions = {"vocab_size": 16_384, "text_length": 64}
    return token_branch("mindalle_text_prior", prior, TokenSampling(top_k=256), vqgan_imagenet_f16_16384(), **captions)


PRIORS = (imagenet_class_prior, mindalle_text_prior)


def paper_recipes() -> dict[str, PaperRecipe]:
    """Name -> recipe."""
    lone: dict[str, PaperRecipe] = {config.__name__: lone_recipe(config) for config in AUTOENCODERS}
    branches: dict[str, PaperRecipe] = {recipe.__name__: recipe for recipe in (*PRIORS, *PAPER_BRANCHES, palette_256)}
    return lone | branches


def lone_recipe(config: Callable[[], AutoencoderTraining]) -> Callable[[], OneModelRecipe]:
    """The recipe of a published autoencoder by itself, with its docstring."""

    def recipe() -> OneModelRecipe:
        return OneModelRecipe(
            name=config.__name__,
            images=images(resolution=256),
            model=config(),
            samples=SamplesConfig(),
            evaluation=EvaluationConfig(),
        )

    recipe.__doc__ = config.__doc__
    return recipe


def token_branch(
    name: str,
    prior: PriorTraining,
    sampling: TokenSampling,
    tokenizer: AutoencoderTraining,
    *,
    vocab_size: int = 1024,
    text_length: int,
) -> TokenBranchRecipe:
    """A recipe on images of the user's own; `sampling` is of the prior."""
    return TokenBranchRecipe(
        name=name,
        images=images(resolution=256, vocab_size=vocab_size, text_length=text_length),
        tokenizer=tokenizer,
        prior=prior,
        sampling=TokenBranchSampling(prior=sampling),
        samples=SamplesConfig(measured_samples=10_000),
        evaluation=EvaluationConfig(held_out_samples=10_000),
    )
