"""Systems of the lecture at the size of minutes on two cores: a function for each system.

Arguments are what several recipes differ in; a number that a single recipe changes stands there, by `replace`.
"""

from typing import Literal, TypeVar

from components.configuration.diffusion import DiffusionTraining
from components.configuration.networks import EMACodesConfig, GumbelCodesConfig, MaskedTransformerConfig
from components.configuration.optimization import Training
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.stages.images import ImagesConfig

Trained = TypeVar("Trained", bound=Training)


def emoji(resolution: int = 64) -> ImagesConfig:
    """OpenMoji's 3,773 images, `resolution` pixels wide; equal numbers are ingested once."""
    return ImagesConfig(
        source="openmoji",
        resolution=resolution,
        samples_per_shard=256,
        holdout_fraction=0.1,
        vocab_size=1024,
        text_length=16,
    )


def scenes() -> ImagesConfig:
    """Colored solids of 32² pixels with exact depth maps."""
    return ImagesConfig(
        source="scenes",
        resolution=32,
        samples_per_shard=256,
        holdout_fraction=0.1,
        vocab_size=300,
        text_length=16,
        limit=3072,
    )


def autoencoder() -> AutoencoderTraining:
    """64² pixels to 8² tokens of 512 codes by mean squared difference alone."""
    return AutoencoderTraining.of(
        resolution=64,
        channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        latent_channels=64,
        patch_shortcut=True,
        bottleneck=EMACodesConfig(codebook_size=512, codebook_dim=8, codebook_decay=0.97),
        reconstruction="mse",  # a mean keeps more color than l1's median
        perceptual_network="none",
        perceptual_weight=0.0,
        adversarial_weight=0.0,
        total_steps=650,
        global_batch_size=8,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=325,
    )


def autoencoder_32() -> AutoencoderTraining:
    """32² pixels to 8² tokens of 128 codes, by the same loss."""
    return autoencoder().replace(
        resolution=32,
        channels=32,
        channel_mult=(1, 2, 2),
        latent_channels=32,
        codebook_size=128,
        total_steps=300,
        global_batch_size=16,
        sample_every=150,
    )


def adversarial(training: AutoencoderTraining, *, start: int) -> AutoencoderTraining:
    """The same with a perceptual loss and, from step `start` on, a patch discriminator's."""
    return training.replace(
        perceptual_network="efficientnet_lite1",
        perceptual_weight=0.1,
        adversarial_weight=0.4,
        discriminator_channels=16,
        discriminator_layers=2,
        discriminator_start=start,
    )


def vqgan() -> AutoencoderTraining:
    """The demo's VQ-GAN with fewer steps."""
    return adversarial(autoencoder(), start=200).replace(total_steps=450)


def vae() -> AutoencoderTraining:
    """32² pixels to Gaussian latents of 4² x 16, trained on the bound of 8-bit images."""
    return autoencoder().replace(
        resolution=32,
        channels=32,
        channel_mult=(1, 2, 2, 2),
        latent_channels=16,
        bottleneck="gaussian",
        reconstruction="discretized_logistic",
        kl_warmup_steps=200,
        total_steps=700,
        global_batch_size=16,
        learning_rate=1e-3,
        betas=(0.9, 0.99),
    )


def vae_gan() -> AutoencoderTraining:
    """First stage of latent diffusion: 64² pixels to Gaussian latents of 16² x 4.

    A divergence that only keeps the latents near the origin (Rombach et al., 2022, appendix G), so that the
    reconstruction decides what they hold.
    """
    return adversarial(autoencoder(), start=300).replace(
        channel_mult=(1, 2, 4), latent_channels=4, bottleneck="gaussian", kl_weight=1e-6
    )


def dvae() -> AutoencoderTraining:
    """Gumbel-softmax, hardened while the divergence gains weight (Ramesh et al., 2021)."""
    return autoencoder().replace(
        bottleneck=GumbelCodesConfig(codebook_size=512, codebook_dim=64),
        patch_shortcut=False,  # with it 8 % of the codes are in use in place of 73 %
        reconstruction="logit_laplace",
        kl_weight=6.6,  # as published; after 150 steps 98 codes' worth are in use, and 51 with 1
        kl_warmup_steps=300,
        temperature_steps=600,
    )


def transformer() -> PriorTraining:
    """Transformer by class over the 64 tokens of an image."""
    return PriorTraining.of(
        model_dim=192,
        num_layers=4,
        num_heads=6,
        dropout=0.1,
        conditions=("label",),
        cond_drop_prob=0.1,
        total_steps=450,
        global_batch_size=32,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=150,
        sample_every=225,
    )


def masked_transformer() -> MaskedPriorTraining:
    """MaskGIT's transformer of the same size, batch and steps."""
    causal = transformer()
    return MaskedPriorTraining(
        network=MaskedTransformerConfig(model_dim=192, num_layers=4, num_heads=6, dropout=0.1),
        conditioning=causal.conditioning,
        optimization=causal.optimization,
    )


def pixelcnn() -> PixelTraining:
    """PixelCNN by class over the sub-pixels of 16² images."""
    return PixelTraining.of(
        network="pixelcnn",
        resolution=16,
        channels=48,
        num_layers=7,
        dropout=0.1,
        conditions=("label",),
        total_steps=450,
        global_batch_size=16,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=225,
    )


def as_row_lstm(training: PixelTraining) -> PixelTraining:
    """The same with a Row LSTM in the PixelCNN's place."""
    return training.replace(network="row_lstm", num_layers=4, kernel_size=3)


def gan() -> GANTraining:
    """Residual GAN by class at 32²."""
    return GANTraining.of(
        resolution=32,
        channels=24,
        channel_mult=(1, 2, 4),
        noise_dim=64,
        discriminator_channels=24,
        discriminator_channel_mult=(1, 2, 4),
        augment=True,
        max_grad_norm=10.0,  # gradients of a hinge loss under spectral norm have norms of 3 to 5
        total_steps=700,
        global_batch_size=32,
        learning_rate=5e-4,
        discriminator_learning_rate=1e-3,
        ema_decay=0.99,
        checkpoint_every=200,
        sample_every=350,
    )


def contrastive(resolution: int = 16, *, steps: int = 300) -> ContrastiveTraining:
    """Captions and images in a common space; an image of any resolution in pixels is 16² patches."""
    return ContrastiveTraining.of(
        resolution=resolution,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        patch_size=resolution // 16,
        embedding_dim=64,
        text_dim=64,
        max_shift=resolution // 16,
        total_steps=steps,
        global_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        checkpoint_every=steps // 2,
        sample_every=steps,
    )


def classifier(
    resolution: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    attention_resolution: int,
    *,
    noisy: bool,
    steps: int,
) -> ClassifierTraining:
    """Classifier of noisy images, for guidance, or of clean images, for judgment."""
    return ClassifierTraining.of(
        resolution=resolution,
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=1,
        attention_resolutions=(attention_resolution,),
        noisy=noisy,
        total_steps=steps,
        global_batch_size=64,
        learning_rate=1e-3,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=steps // 2,
        sample_every=steps,
    )


def diffusion_prior() -> DiffusionPriorTraining:
    """DALL-E 2's prior from a caption to the embedding of an image of 16²."""
    return DiffusionPriorTraining.of(
        resolution=16,
        model_dim=128,
        num_layers=4,
        num_heads=4,
        total_steps=300,
        global_batch_size=64,
        learning_rate=1e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=300,
    )


def unet(
    resolution: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    *,
    steps: int,
    batch: int,
    rate: float = 1e-3,
    saves: int = 4,
) -> DiffusionTraining:
    """U-Net by class: v-prediction, min-SNR, cosine schedule.

    Args:
        resolution: pixels; those of `attention_resolutions` too.
        batch: images a step.
        rate: the learning rate's peak.
        saves: checkpoints on the way.
    """
    return DiffusionTraining.of(
        resolution=resolution,
        model_channels=model_channels,
        channel_mult=channel_mult,
        attention_resolutions=attention_resolutions,
        total_steps=steps,
        global_batch_size=batch,
        learning_rate=rate,
        ema_decay=0.995,
        precision="bf16",
        checkpoint_every=steps // saves,
        sample_every=steps // 2,
    )


def diffusion(resolution: Literal[16, 32] = 16) -> DiffusionTraining:
    """The U-Net of the rows; both resolutions take the same minutes."""
    if resolution == 32:
        return unet(32, 32, (1, 2, 4), (8,), steps=1000, batch=12)
    # In the same minutes better than 600 steps of 64 images: distance 77 in place of 85.
    return unet(16, 32, (1, 2, 4), (8, 4), steps=1320, batch=24)


def sketching(resolution: Literal[16, 32] = 16) -> DiffusionTraining:
    """The same with x_0 predicted: flat colors after minutes, where v-prediction leaves grain."""
    return diffusion(resolution).replace(prediction_type="sample")


def as_ddpm(training: DiffusionTraining) -> DiffusionTraining:
    """DDPM (Ho et al., 2020): no class, linear schedule, noise prediction, fixed large variance."""
    return training.replace(
        conditions=(), schedule="linear", prediction_type="epsilon", min_snr_gamma=None, variance="fixed_large"
    )


def as_improved_ddpm(training: DiffusionTraining) -> DiffusionTraining:
    """Improved DDPM (Nichol and Dhariwal, 2021): cosine schedule, learned variance, hybrid loss."""
    return as_ddpm(training).replace(schedule="cosine", variance="learned_range", loss="hybrid")
