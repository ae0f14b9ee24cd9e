"""Diffusion models at their published size: networks with the published number of parameters, published training.

Sources: DDPM is Ho et al. (2020); IDDPM, Nichol and Dhariwal (2021); ADM, Dhariwal and Nichol (2021), its tables of
hyperparameters and the flags of openai/guided-diffusion; CDM, Ho et al. (2022); GLIDE, Nichol et al. (2022) and
openai/glide-text2im; LDM, Rombach et al. (2022) and the configurations of CompVis/latent-diffusion; Palette, Saharia et
al. (2022). Where a number was not published, the docstring says that it is ours.

A label is dropped where guidance needs it, and its table then has one row more: those of ADM need none. ImageNet has
1,000 classes; GLIDE's vocabulary 50,257 words, of which a text has 128.
"""

from collections.abc import Callable
from typing import Any

from components.configuration.diffusion import DiffusionTraining

ADM_64, ADM_128, ADM_256, ADM_512 = (1, 2, 3, 4), (1, 1, 2, 3, 4), (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
NORM_GROUPS = 32  # everywhere: `normalization` of OpenAI's and LDM's code, the default of DDPM's group norm
# Of ADM, IDDPM and GLIDE: noise and a variance are predicted and the bound is a small part of the loss.
LEARNED_VARIANCE: dict[str, Any] = {
    "prediction_type": "epsilon",
    "variance": "learned_range",
    "loss": "hybrid",
    "min_snr_gamma": None,
}
# Of DDPM, LDM and Palette: noise is predicted, the variance is fixed.
SIMPLE: dict[str, Any] = {"prediction_type": "epsilon", "variance": "fixed_large", "min_snr_gamma": None}
# Adam at a constant rate, a slow average of the weights.
CONSTANT_RATE: dict[str, Any] = {
    "final_lr_fraction": 1.0,
    "warmup_steps": 0,
    "betas": (0.9, 0.999),
    "ema_decay": 0.9999,
}
LOGGED: dict[str, Any] = {"log_every": 100, "checkpoint_every": 5000, "sample_every": 5000}
ALWAYS_LABELED: dict[str, Any] = {"conditions": ("label",), "cond_drop_prob": 0.0}
UNCONDITIONAL: dict[str, Any] = {"conditions": (), "cond_drop_prob": 0.0}
# Of upsamplers that see the low-resolution image as it is.
WITHOUT_NOISE: dict[str, Any] = {"max_noise_level": 0}


def ddpm_cifar_10() -> DiffusionTraining:
    """DDPM, 32²: appendix B. 800,000 steps of 128 images, rate 2e-4 after 5,000 steps, sampled in 1,000 steps."""
    return _published(
        resolution=32,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        num_heads=1,
        dropout=0.1,
        scale_shift_norm=False,
        resample_in_blocks=False,
        total_steps=800_000,
        global_batch_size=128,
        learning_rate=2e-4,
        warmup_steps=5000,
        schedule="linear",
        **SIMPLE,
        **UNCONDITIONAL,
    )


def iddpm_imagenet_64() -> DiffusionTraining:
    """Improved DDPM, 64², no label: 1,500,000 steps of 128 images at 4,000 noise levels, sampled in 250 steps."""
    return _published(
        resolution=64,
        model_channels=128,
        channel_mult=ADM_64,
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        resample_in_blocks=False,
        total_steps=1_500_000,
        global_batch_size=128,
        learning_rate=1e-4,
        schedule="cosine",
        num_train_timesteps=4000,
        **LEARNED_VARIANCE,
        **UNCONDITIONAL,
    )


def adm_imagenet_64() -> DiffusionTraining:
    """ADM, 64²: 540,000 steps of 2,048 images, cosine schedule, dropout."""
    return _adm(
        resolution=64,
        model_channels=192,
        channel_mult=ADM_64,
        num_res_blocks=3,
        head_dim=64,
        dropout=0.1,
        schedule="cosine",
        total_steps=540_000,
        global_batch_size=2048,
        learning_rate=3e-4,
        **ALWAYS_LABELED,
    )


def adm_imagenet_128() -> DiffusionTraining:
    """ADM, 128²: 4,360,000 steps of 256 images."""
    return _adm(resolution=128, channel_mult=ADM_128, num_heads=4, total_steps=4_360_000, **ALWAYS_LABELED)


def adm_imagenet_256() -> DiffusionTraining:
    """ADM, 256²: 1,980,000 steps of 256 images."""
    return _adm(resolution=256, channel_mult=ADM_256, head_dim=64, total_steps=1_980_000, **ALWAYS_LABELED)


def adm_imagenet_256_unconditional() -> DiffusionTraining:
    """ADM, 256², without a label, for guidance by a classifier alone. Steps as those of the other."""
    return _adm(resolution=256, channel_mult=ADM_256, head_dim=64, total_steps=1_980_000, **UNCONDITIONAL)


def adm_imagenet_512() -> DiffusionTraining:
    """ADM, 512²: 1,940,000 steps of 256 images."""
    return _adm(resolution=512, channel_mult=ADM_512, head_dim=64, total_steps=1_940_000, **ALWAYS_LABELED)


def adm_upsampler_64_256() -> DiffusionTraining:
    """ADM's upsampler, 64² to 256²: 500,000 steps of 256 images."""
    return _adm(
        resolution=256,
        low_res_resolution=64,
        model_channels=192,
        channel_mult=ADM_256,
        num_heads=4,
        total_steps=500_000,
        **ALWAYS_LABELED,
        **WITHOUT_NOISE,
    )


def adm_upsampler_128_512() -> DiffusionTraining:
    """ADM's upsampler, 128² to 512²: six levels, as the one to 256². Steps as those of that one."""
    return _adm(
        resolution=512,
        low_res_resolution=128,
        model_channels=192,
        channel_mult=ADM_256,
        attention_resolutions=(32, 16),
        head_dim=64,
        total_steps=500_000,
        **ALWAYS_LABELED,
        **WITHOUT_NOISE,
    )


def cdm_upsampler_64_256() -> DiffusionTraining:
    """CDM's upsampler, 64² to 256²: the method of the paper in a network of ours, so there is no count to reach.

    Published: conditioning augmentation by noise of a level that each image draws, embedded like the time, from the
    whole schedule; cosine schedule; no code and no weights. Network, batch and steps are those of ADM's upsampler here,
    and so are ours.
    """
    return _adm(
        resolution=256,
        low_res_resolution=64,
        model_channels=192,
        channel_mult=ADM_256,
        num_heads=4,
        schedule="cosine",
        total_steps=500_000,
        max_noise_level=999,
        **ALWAYS_LABELED,
    )


def glide_base() -> DiffusionTraining:
    """GLIDE, 64², the released (filtered) network with its text transformer.

    Published for the large one: 2,500,000 steps of 2,048 images, then texts dropped in one of five; guidance scale 3.
    """
    return _glide(
        resolution=64,
        channel_mult=ADM_64,
        num_res_blocks=3,
        schedule="cosine",
        total_steps=2_500_000,
        global_batch_size=2048,
        cond_drop_prob=0.2,
    )


def glide_upsampler() -> DiffusionTraining:
    """GLIDE's upsampler, 64² to 256², released (filtered), with a text transformer of its own.

    Published for the large one: 1,600,000 steps of 512 images; sampled in 27 steps.
    """
    return _glide(
        resolution=256,
        low_res_resolution=64,
        channel_mult=ADM_256,
        num_res_blocks=2,
        schedule="linear",
        total_steps=1_600_000,
        global_batch_size=512,
        cond_drop_prob=0.0,
        **WITHOUT_NOISE,
    )


def ldm_ffhq_f4() -> DiffusionTraining:
    """LDM, unconditional, on latents of 64² x 3 of vq-f4: `configs/latent-diffusion/ffhq-ldm-vq-4.yaml`, table 12."""
    return _ldm(
        resolution=64,
        in_channels=3,
        model_channels=224,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(32, 16, 8),
        head_dim=32,
        total_steps=635_000,
        global_batch_size=42,
        learning_rate=8.4e-5,
        **UNCONDITIONAL,
    )


def ldm_imagenet_f8() -> DiffusionTraining:
    """LDM by class on latents of 32² x 4 of vq-f8: `configs/latent-diffusion/cin-ldm-vq-f8.yaml`. Steps are ours."""
    return _ldm(
        resolution=32,
        in_channels=4,
        model_channels=256,
        channel_mult=(1, 2, 4),
        attention_resolutions=(32, 16, 8),
        head_dim=32,
        text_conditioning="spatial_transformer",
        class_token_dim=512,
        total_steps=500_000,
        global_batch_size=48,
        learning_rate=48e-6,
        **ALWAYS_LABELED,
    )


def ldm_imagenet_f4() -> DiffusionTraining:
    """LDM by class on latents of 64² x 3 of vq-f4, the released `cin256-v2` with a null label; table 12."""
    return _ldm(
        resolution=64,
        in_channels=3,
        model_channels=192,
        channel_mult=(1, 2, 3, 5),
        attention_resolutions=(32, 16, 8),
        num_heads=1,
        text_conditioning="spatial_transformer",
        class_token_dim=512,
        total_steps=178_000,
        global_batch_size=1200,
        learning_rate=1e-4,
        conditions=("label",),
        cond_drop_prob=0.1,
    )


def ldm_text_to_image() -> DiffusionTraining:
    """LDM by text on latents of 32² x 4 of kl-f8, 1.4 billion with its text encoder; table 15.

    That encoder stands outside here; its states have 1,280 features.
    """
    return _ldm(
        resolution=32,
        in_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(32, 16, 8),
        num_heads=8,
        beta_start=0.00085,
        beta_end=0.012,
        text_conditioning="spatial_transformer",
        text_states_dim=1280,
        total_steps=390_000,
        global_batch_size=680,
        learning_rate=1e-4,
        conditions=("text_states",),
        cond_drop_prob=0.1,
    )


def palette() -> DiffusionTraining:
    """Palette, 256²: ADM's network without a label, the other image concatenated; 1,000,000 steps of 1,024 images.

    Published: rate 1e-4 after 10,000 steps, 2,000 noise levels, 1,000 steps at sampling, on a schedule fitted to them,
    where ours takes every second level; one network for four tasks. Ours sees the mask as a channel more.
    """
    return DiffusionTraining.of(
        resolution=256,
        model_channels=256,
        channel_mult=ADM_256,
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        norm_groups=NORM_GROUPS,
        tasks=("inpainting", "uncropping", "colorization", "jpeg"),
        total_steps=1_000_000,
        global_batch_size=1024,
        learning_rate=1e-4,
        schedule="linear",
        beta_start=1e-6,
        beta_end=1e-2,
        num_train_timesteps=2000,
        **LOGGED,
        **SIMPLE,
        **UNCONDITIONAL,
        **(CONSTANT_RATE | {"warmup_steps": 10_000}),
    )


PAPER_DIFFUSION: tuple[Callable[[], DiffusionTraining], ...] = (
    ddpm_cifar_10,
    iddpm_imagenet_64,
    adm_imagenet_64,
    adm_imagenet_128,
    adm_imagenet_256,
    adm_imagenet_256_unconditional,
    adm_imagenet_512,
    adm_upsampler_64_256,
    adm_upsampler_128_512,
    cdm_upsampler_64_256,
    glide_base,
    glide_upsampler,
    ldm_ffhq_f4,
    ldm_imagenet_f8,
    ldm_imagenet_f4,
    ldm_text_to_image,
    palette,
)


def _published(**numbers: Any) -> DiffusionTraining:
    heads: dict[str, Any] = {"head_dim": None} if "num_heads" in numbers else {}
    return DiffusionTraining.of(**(CONSTANT_RATE | LOGGED | heads | {"norm_groups": NORM_GROUPS} | numbers))


def _adm(**numbers: Any) -> DiffusionTraining:
    shared = {"model_channels": 256, "num_res_blocks": 2, "attention_resolutions": (32, 16, 8), "schedule": "linear"}
    training = {"global_batch_size": 256, "learning_rate": 1e-4, "weight_decay": 0.0}
    return _published(**(shared | training | LEARNED_VARIANCE | numbers))


def _glide(**numbers: Any) -> DiffusionTraining:
    network = {"model_channels": 192, "head_dim": 64, "dropout": 0.1, "text_conditioning": "cross_attention"}
    text = {"text_dim": 512, "text_layers": 16, "text_heads": 8, "text_padding": "learned", "conditions": ("text",)}
    return _adm(**(network | text | numbers))


def _ldm(**numbers: Any) -> DiffusionTraining:
    shared = {"num_res_blocks": 2, "scale_shift_norm": False, "resample_in_blocks": False}
    schedule = {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    return _published(**(shared | schedule | SIMPLE | numbers))
