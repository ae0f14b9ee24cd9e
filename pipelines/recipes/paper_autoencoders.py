"""Autoencoders at their published size: networks with the published number of parameters, published losses and rates.

VQ-GAN is of Esser et al. (2021), LDM of Rombach et al. (2022); VQ-VAE and dVAE say theirs below. The first two publish
a batch for each GPU and a learning rate for each image of the batch (4.5e-6), constant, under Adam with betas
(0.5, 0.9); the number of GPUs, 8, and of steps is ours. They need the weights of VGG-16 and LPIPS in one safetensors
file. Codebook and commitment loss have their weights of the paper; the published code has the two the other way round.
"""

from components.configuration.trainings import AutoencoderTraining

GPUS = 8
RATE_PER_IMAGE = 4.5e-6
STEPS = 500_000
NORM_GROUPS = 32  # `Normalize` of both in modules/diffusionmodules/model.py
LPIPS_WEIGHTS = "vgg16_lpips.safetensors"
F4, F8, F8_VQ, F16 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)


def vqgan_imagenet_f16_1024(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """VQ-GAN, 256² to 16² tokens of 1,024 codes: taming-transformers, `configs/imagenet_vqgan.yaml`."""
    return _codes(
        1024,
        latent_channels=256,
        channel_mult=F16,
        attention_resolutions=(16,),
        batch_per_gpu=3,
        adversarial_weight=0.8,
        discriminator_start=250_000,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def vqgan_imagenet_f16_16384(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """VQ-GAN, 256² to 16² tokens of 16,384 codes: `model.yaml` next to its weights; the batch is that of the other."""
    return _codes(
        16_384,
        latent_channels=256,
        channel_mult=F16,
        attention_resolutions=(16,),
        batch_per_gpu=3,
        adversarial_weight=0.75,
        discriminator_layers=2,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def ldm_kl_f4(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to a Gaussian of 64² x 3: `models/first_stage_models/kl-f4/config.yaml`."""
    return _gaussian(
        latent_channels=3, channel_mult=F4, batch_per_gpu=10, perceptual_weights_uri=perceptual_weights_uri
    )


def ldm_kl_f8(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to a Gaussian of 32² x 4: `models/first_stage_models/kl-f8/config.yaml`."""
    return _gaussian(latent_channels=4, channel_mult=F8, batch_per_gpu=4, perceptual_weights_uri=perceptual_weights_uri)


def ldm_kl_f16(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to a Gaussian of 16² x 16: `models/first_stage_models/kl-f16/config.yaml`."""
    return _gaussian(
        latent_channels=16,
        channel_mult=F16,
        attention_resolutions=(16,),
        batch_per_gpu=6,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def ldm_vq_f4(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to 64² codes of 8,192 x 3: `models/first_stage_models/vq-f4/config.yaml`."""
    return _codes(
        8192,
        latent_channels=3,
        channel_mult=F4,
        batch_per_gpu=8,
        adversarial_weight=0.75,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def ldm_vq_f8(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to 32² codes of 16,384 x 4: `models/first_stage_models/vq-f8/config.yaml`."""
    return _codes(
        16_384,
        latent_channels=4,
        channel_mult=F8_VQ,
        attention_resolutions=(32,),
        batch_per_gpu=10,
        adversarial_weight=0.6,
        discriminator_layers=2,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def ldm_vq_f16(*, perceptual_weights_uri: str = LPIPS_WEIGHTS) -> AutoencoderTraining:
    """LDM first stage, 256² to 16² codes of 16,384 x 8: `models/first_stage_models/vq-f16/config.yaml`."""
    return _codes(
        16_384,
        latent_channels=8,
        channel_mult=F16,
        attention_resolutions=(16,),
        batch_per_gpu=14,
        adversarial_weight=0.75,
        discriminator_start=250_000,
        discriminator_layers=2,
        perceptual_weights_uri=perceptual_weights_uri,
    )


def vqvae_imagenet_128() -> AutoencoderTraining:
    """VQ-VAE, 128² to 32² tokens of 512 codes, trained as in section 4.1 of van den Oord et al. (2017).

    Published: Adam, rate 2e-4, 250,000 steps of 128 images, two strided convolutions and two residual blocks 256 wide
    on each side. Ours halves as often and has residual blocks at every resolution, so there is no count to reach.
    """
    return AutoencoderTraining.of(
        resolution=128,
        channels=64,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        latent_channels=64,
        bottleneck="vq",
        codebook_size=512,
        l2_normalize=False,
        reconstruction="mse",
        perceptual_network="none",
        adversarial_weight=0.0,
        total_steps=250_000,
        global_batch_size=128,
        learning_rate=2e-4,
        final_lr_fraction=1.0,
        warmup_steps=0,
        betas=(0.9, 0.999),
        ema_decay=0.0,
        log_every=100,
        checkpoint_every=5000,
        sample_every=5000,
    )


def dalle_dvae_f8_8192() -> AutoencoderTraining:
    """DALL-E's dVAE, 256² to 32² tokens of 8,192 codes, trained as in appendix A.2 of Ramesh et al. (2021).

    Its encoder and decoder are an architecture of their own (four groups of bottleneck blocks 256 wide); ours, of about
    the same size, stand in for them, so there is no count to reach. Published: 3,000,000 updates of 512 images, AdamW
    with weight decay 1e-4, an average of the weights, KL weight 0 to 6.6 in 5,000 updates, temperature 1 to 1/16 in
    150,000, rate 1e-4 to 1.25e-6 along a cosine of 1,200,000 updates. Ours has that cosine over all updates.
    """
    return AutoencoderTraining.of(
        resolution=256,
        channels=128,
        channel_mult=F8,
        num_res_blocks=2,
        latent_channels=128,
        bottleneck="gumbel",
        codebook_size=8192,
        codebook_init="random",
        reconstruction="logit_laplace",
        kl_weight=6.6,
        kl_warmup_steps=5000,
        temperature_steps=150_000,
        perceptual_network="none",
        adversarial_weight=0.0,
        total_steps=3_000_000,
        global_batch_size=512,
        learning_rate=1e-4,
        lr_decay="cosine",
        final_lr_fraction=0.0125,
        warmup_steps=0,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        ema_decay=0.999,
        log_every=100,
        checkpoint_every=5000,
        sample_every=5000,
    )


def _codes(
    codebook_size: int,
    *,
    latent_channels: int,
    channel_mult: tuple[int, ...],
    batch_per_gpu: int,
    adversarial_weight: float,
    perceptual_weights_uri: str,
    attention_resolutions: tuple[int, ...] = (),
    discriminator_start: int = 0,
    discriminator_layers: int = 3,
) -> AutoencoderTraining:
    return AutoencoderTraining.of(
        resolution=256,
        channels=128,
        channel_mult=channel_mult,
        num_res_blocks=2,
        attention_resolutions=attention_resolutions,
        latent_channels=latent_channels,
        norm_groups=NORM_GROUPS,
        bottleneck="vq",
        codebook_size=codebook_size,
        l2_normalize=False,
        perceptual_network="vgg16_lpips",
        perceptual_weights_uri=perceptual_weights_uri,
        adversarial_weight=adversarial_weight,
        discriminator_start=discriminator_start,
        discriminator_layers=discriminator_layers,
        total_steps=STEPS,
        global_batch_size=GPUS * batch_per_gpu,
        learning_rate=GPUS * batch_per_gpu * RATE_PER_IMAGE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        ema_decay=0.0,
        log_every=100,
        checkpoint_every=5000,
        sample_every=5000,
    )


def _gaussian(
    *,
    latent_channels: int,
    channel_mult: tuple[int, ...],
    batch_per_gpu: int,
    perceptual_weights_uri: str,
    attention_resolutions: tuple[int, ...] = (),
) -> AutoencoderTraining:
    return AutoencoderTraining.of(
        resolution=256,
        channels=128,
        channel_mult=channel_mult,
        num_res_blocks=2,
        attention_resolutions=attention_resolutions,
        latent_channels=latent_channels,
        norm_groups=NORM_GROUPS,
        bottleneck="gaussian",
        kl_weight=1e-6,
        perceptual_network="vgg16_lpips",
        perceptual_weights_uri=perceptual_weights_uri,
        adversarial_weight=0.5,
        discriminator_start=50_000,
        total_steps=STEPS,
        global_batch_size=GPUS * batch_per_gpu,
        learning_rate=GPUS * batch_per_gpu * RATE_PER_IMAGE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        ema_decay=0.0,
        log_every=100,
        checkpoint_every=5000,
        sample_every=5000,
    )
