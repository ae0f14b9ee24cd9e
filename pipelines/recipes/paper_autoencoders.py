"""Autoencoders at their published size: networks with the published number of parameters, published losses and rates.

VQ-GAN is of Esser et al. (2021), LDM of Rombach et al. (2022); VQ-VAE and dVAE say theirs below. The first two publish
a batch for each GPU and a learning rate for each image of the batch (4.5e-6), constant, under Adam with betas
(0.5, 0.9); the number of GPUs, 8, and of steps is ours. They need the weights of VGG-16 and LPIPS in one safetensors
file. Codebook and commitment loss have their weights of the paper; the published code has the two the other way round.
"""

from typing import NamedTuple

from components.configuration.networks import (
    AutoencoderNetworkConfig,
    GaussianConfig,
    GradientCodesConfig,
    GumbelCodesConfig,
)
from components.configuration.optimization import AdversarialOptimization
from components.configuration.trainings import AutoencoderData, AutoencoderLosses, AutoencoderTraining
from pipelines.recipes.paper_diffusion import INTERVALS, NORM_GROUPS

GPUS = 8
RATE_PER_IMAGE = 4.5e-6
F4, F8, F8_VQ, F16 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)


class PaperAutoencoder(NamedTuple):
    summary: str  # what it is, and where its numbers are from
    training: AutoencoderTraining


def first_stage(
    summary: str,
    codes: int | None,  # moved by gradient; None: a Gaussian
    latent_channels: int,
    channel_mult: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    batch_per_gpu: int,
    adversarial_weight: float,
    discriminator_start: int,
    discriminator_layers: int,
) -> PaperAutoencoder:
    """A row of VQ-GAN or LDM, with what all have. `Normalize` of both is in modules/diffusionmodules/model.py."""
    network = AutoencoderNetworkConfig(
        channels=128,
        channel_mult=channel_mult,
        num_res_blocks=2,
        attention_resolutions=attention_resolutions,
        latent_channels=latent_channels,
        norm_groups=NORM_GROUPS,
        bottleneck=GaussianConfig() if codes is None else GradientCodesConfig(codebook_size=codes, l2_normalize=False),
    )
    losses = AutoencoderLosses(
        kl_weight=1e-6 if codes is None else 1.0,
        perceptual_network="vgg16_lpips",
        perceptual_weights_uri="vgg16_lpips.safetensors",
        adversarial_weight=adversarial_weight,
        discriminator_start=discriminator_start,
        discriminator_layers=discriminator_layers,
    )
    optimization = AdversarialOptimization(
        total_steps=500_000,
        global_batch_size=GPUS * batch_per_gpu,
        learning_rate=GPUS * batch_per_gpu * RATE_PER_IMAGE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        ema_decay=0.0,
        precision="bf16",
        compile_network=True,
        **INTERVALS,
    )
    data = AutoencoderData(resolution=256)
    return PaperAutoencoder(
        summary, AutoencoderTraining(network=network, losses=losses, data=data, optimization=optimization)
    )


# fmt: off
AUTOENCODERS: dict[str, PaperAutoencoder] = {
    # codes, latent channels, levels, attention, batch of a GPU; adversarial weight, start and layers
    "vqgan_imagenet_f16_1024": first_stage(
        "VQ-GAN, 256² to 16² tokens of 1,024 codes: taming-transformers, `configs/imagenet_vqgan.yaml`.",
        1024, 256, F16, (16,), 3, 0.8, 250_000, 3),
    "vqgan_imagenet_f16_16384": first_stage(
        "VQ-GAN, 256² to 16² tokens of 16,384 codes: `model.yaml` next to its weights; the batch is that of the other.",
        16_384, 256, F16, (16,), 3, 0.75, 0, 2),
    "ldm_kl_f4": first_stage(
        "LDM first stage, 256² to a Gaussian of 64² x 3: `models/first_stage_models/kl-f4/config.yaml`.",
        None, 3, F4, (), 10, 0.5, 50_000, 3),
    "ldm_kl_f8": first_stage(
        "LDM first stage, 256² to a Gaussian of 32² x 4: `models/first_stage_models/kl-f8/config.yaml`.",
        None, 4, F8, (), 4, 0.5, 50_000, 3),
    "ldm_kl_f16": first_stage(
        "LDM first stage, 256² to a Gaussian of 16² x 16: `models/first_stage_models/kl-f16/config.yaml`.",
        None, 16, F16, (16,), 6, 0.5, 50_000, 3),
    "ldm_vq_f4": first_stage(
        "LDM first stage, 256² to 64² codes of 8,192 x 3: `models/first_stage_models/vq-f4/config.yaml`.",
        8192, 3, F4, (), 8, 0.75, 0, 3),
    "ldm_vq_f8": first_stage(
        "LDM first stage, 256² to 32² codes of 16,384 x 4: `models/first_stage_models/vq-f8/config.yaml`.",
        16_384, 4, F8_VQ, (32,), 10, 0.6, 0, 2),
    "ldm_vq_f16": first_stage(
        "LDM first stage, 256² to 16² codes of 16,384 x 8: `models/first_stage_models/vq-f16/config.yaml`.",
        16_384, 8, F16, (16,), 14, 0.75, 250_000, 2),
    # Its encoder and decoder are an architecture of their own (four groups of bottleneck blocks 256 wide); ours, of
    # about the same size, stand in for them, so there is no count to reach. Published: 3,000,000 updates of 512 images,
    # AdamW with weight decay 1e-4, an average of the weights, KL weight 0 to 6.6 in 5,000 updates, temperature 1 to
    # 1/16 in 150,000, rate 1e-4 to 1.25e-6 along a cosine of 1,200,000 updates. Ours has that cosine over all updates.
    "dalle_dvae_f8_8192": PaperAutoencoder(
        "DALL-E's dVAE, 256² to 32² tokens of 8,192 codes, trained as in appendix A.2 of Ramesh et al. (2021).",
        AutoencoderTraining(
            network=AutoencoderNetworkConfig(
                channels=128, channel_mult=F8, num_res_blocks=2, latent_channels=128, reconstruction="logit_laplace",
                bottleneck=GumbelCodesConfig(codebook_size=8192, codebook_init="random")),
            losses=AutoencoderLosses(
                kl_weight=6.6, kl_warmup_steps=5000, temperature_steps=150_000,
                perceptual_network="none", adversarial_weight=0.0),
            data=AutoencoderData(resolution=256),
            optimization=AdversarialOptimization(
                total_steps=3_000_000, global_batch_size=512, learning_rate=1e-4, lr_decay="cosine",
                final_lr_fraction=0.0125, warmup_steps=0, betas=(0.9, 0.999), weight_decay=1e-4, ema_decay=0.999,
                precision="bf16", compile_network=True, **INTERVALS))),
    # Published: Adam, rate 2e-4, 250,000 steps of 128 images, two strided convolutions and two residual blocks 256 wide
    # on each side. Ours halves as often and has residual blocks at every resolution, so there is no count to reach.
    "vqvae_imagenet_128": PaperAutoencoder(
        "VQ-VAE, 128² to 32² tokens of 512 codes, trained as in section 4.1 of van den Oord et al. (2017).",
        AutoencoderTraining(
            network=AutoencoderNetworkConfig(
                channels=64, channel_mult=(1, 2, 4), num_res_blocks=1, latent_channels=64, reconstruction="mse",
                bottleneck=GradientCodesConfig(codebook_size=512, l2_normalize=False)),
            losses=AutoencoderLosses(perceptual_network="none", adversarial_weight=0.0),
            data=AutoencoderData(resolution=128),
            optimization=AdversarialOptimization(
                total_steps=250_000, global_batch_size=128, learning_rate=2e-4, final_lr_fraction=1.0, warmup_steps=0,
                betas=(0.9, 0.999), ema_decay=0.0, precision="bf16", compile_network=True, **INTERVALS))),
}
# fmt: on
