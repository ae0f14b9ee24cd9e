"""Diffusion models at their published size: networks with the published number of parameters, published training.

Sources: DDPM is Ho et al. (2020); IDDPM, Nichol and Dhariwal (2021); ADM, Dhariwal and Nichol (2021), its tables of
hyperparameters and the flags of openai/guided-diffusion; CDM, Ho et al. (2022); GLIDE, Nichol et al. (2022) and
openai/glide-text2im; LDM, Rombach et al. (2022) and the configurations of CompVis/latent-diffusion; Palette, Saharia et
al. (2022). Where a number was not published, the row says that it is ours. All train in bf16, which is ours too: some
were published in fp16 with a scale of the loss, others in fp32.

A label is dropped where guidance needs it, and its table then has one row more: those of ADM need none. ImageNet has
1,000 classes; GLIDE's vocabulary 50,257 words, of which a text has 128.
"""

from typing import Literal

from components.configuration.conditions import DiffusionConditions, PaddedTextConfig
from components.configuration.diffusion import DegradationConfig, DiffusionData, DiffusionTraining, LowResConfig
from components.configuration.networks import UNetConfig
from components.configuration.optimization import OptimizationConfig
from components.configuration.processes import DiscreteProcess

ADM_64, ADM_128, ADM_256, ADM_512 = (1, 2, 3, 4), (1, 1, 2, 3, 4), (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
NORM_GROUPS = 32  # everywhere: `normalization` of OpenAI's and LDM's code, the default of DDPM's group norm
# The best time between checkpoints is √(2 · seconds that one holds training · seconds between faults) (Young, 1974): 20
# minutes for 2 seconds, in which a GPU copies 22 GB to its host, and a fault in four days.
CHECKPOINT_MINUTES = 20.0
INTERVALS = {
    "log_every": 100,
    "checkpoint_every": 5000,
    "checkpoint_minutes": CHECKPOINT_MINUTES,
    "sample_every": 5000,
}

# Of DDPM and Palette: noise is predicted, the variance is fixed. LDM has a schedule of its own.
SIMPLE = DiscreteProcess(schedule="linear", prediction_type="epsilon", variance="fixed_large", min_snr_gamma=None)
LATENT = SIMPLE.replace(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
# Of ADM, IDDPM and GLIDE: noise and a variance are predicted and the bound is a small part of the loss.
LINEAR = SIMPLE.replace(variance="learned_range", loss="hybrid")
COSINE = LINEAR.replace(schedule="cosine")

UNCONDITIONAL = DiffusionConditions(conditions=(), cond_drop_prob=0.0)
LABEL = DiffusionConditions(conditions=("label",), cond_drop_prob=0.0)
GLIDE_TEXT = DiffusionConditions(
    conditions=("text",),
    cond_drop_prob=0.2,
    text=PaddedTextConfig(text_dim=512, text_layers=16, text_heads=8, text_padding="learned"),
)
# Of upsamplers that see the low-resolution image as it is.
FROM_64, FROM_128 = (LowResConfig(low_res_resolution=side, max_noise_level=0) for side in (64, 128))


def unet(
    resolution: int,  # pixels, or sides of latents
    model_channels: int,
    channel_mult: tuple[int | float, ...],
    num_res_blocks: int,
    attention_resolutions: tuple[int, ...],
    head_dim: int | None,
    num_heads: int | None,
    process: DiscreteProcess,
    conditioning: DiffusionConditions,
    total_steps: int,
    global_batch_size: int,
    learning_rate: float,
    *,
    in_channels: int = 3,
    dropout: float = 0.0,
    scale_shift_norm: bool = True,
    resample_in_blocks: bool = True,
    text_conditioning: Literal["pooled", "cross_attention", "spatial_transformer"] = "pooled",
    class_token_dim: int | None = None,
    low_res: LowResConfig | None = None,
    degradation: DegradationConfig | None = None,
    warmup_steps: int = 0,
) -> DiffusionTraining:
    """A row of the table, with what all have: groups of norms, Adam at a constant rate, a slow average of weights."""
    network = UNetConfig(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_resolutions,
        head_dim=head_dim,
        num_heads=num_heads,
        dropout=dropout,
        text_conditioning=text_conditioning,
        class_token_dim=class_token_dim,
        scale_shift_norm=scale_shift_norm,
        resample_in_blocks=resample_in_blocks,
        norm_groups=NORM_GROUPS,
    )
    optimization = OptimizationConfig(
        total_steps=total_steps,
        global_batch_size=global_batch_size,
        learning_rate=learning_rate,
        final_lr_fraction=1.0,
        warmup_steps=warmup_steps,
        betas=(0.9, 0.999),
        ema_decay=0.9999,
        precision="bf16",
        compile_network=True,
        **INTERVALS,
    )
    return DiffusionTraining(
        network=network,
        process=process,
        conditioning=conditioning,
        low_res=low_res,
        degradation=degradation,
        data=DiffusionData(resolution=resolution, in_channels=in_channels),
        optimization=optimization,
    )


# fmt: off
PAPER_DIFFUSION: dict[str, DiffusionTraining] = {
    # side, width, levels, blocks, attention, head_dim, num_heads, process, conditions, steps, batch, rate

    # DDPM: appendix B; sampled in 1,000 steps.
    "ddpm_cifar_10": unet(
        32,  128, (1, 2, 2, 2), 2, (16,), None, 1, SIMPLE, UNCONDITIONAL, 800_000, 128, 2e-4,
        dropout=0.1, scale_shift_norm=False, resample_in_blocks=False, warmup_steps=5000),
    # Improved DDPM at 4,000 noise levels, sampled in 250 steps.
    "iddpm_imagenet_64": unet(
        64,  128, ADM_64, 3, (16, 8), None, 4, COSINE.replace(num_train_timesteps=4000), UNCONDITIONAL, 1_500_000, 128,
        1e-4, resample_in_blocks=False),

    # ADM. Steps of the model without a label, for guidance by a classifier alone, as those of the other.
    "adm_imagenet_64": unet(
        64,  192, ADM_64,  3, (32, 16, 8), 64, None, COSINE, LABEL,         540_000, 2048, 3e-4, dropout=0.1),
    "adm_imagenet_128": unet(
        128, 256, ADM_128, 2, (32, 16, 8), None, 4,  LINEAR, LABEL,         4_360_000, 256, 1e-4),
    "adm_imagenet_256": unet(
        256, 256, ADM_256, 2, (32, 16, 8), 64, None, LINEAR, LABEL,         1_980_000, 256, 1e-4),
    "adm_imagenet_256_unconditional": unet(
        256, 256, ADM_256, 2, (32, 16, 8), 64, None, LINEAR, UNCONDITIONAL, 1_980_000, 256, 1e-4),
    "adm_imagenet_512": unet(
        512, 256, ADM_512, 2, (32, 16, 8), 64, None, LINEAR, LABEL,         1_940_000, 256, 1e-4),

    # ADM's upsamplers. That to 512² has six levels, as the one to 256², and its steps.
    "adm_upsampler_64_256": unet(
        256, 192, ADM_256, 2, (32, 16, 8), None, 4,  LINEAR, LABEL,         500_000, 256, 1e-4, low_res=FROM_64),
    "adm_upsampler_128_512": unet(
        512, 192, ADM_256, 2, (32, 16),    64, None, LINEAR, LABEL,         500_000, 256, 1e-4, low_res=FROM_128),
    # CDM's upsampler: the method of the paper in a network of ours, so there is no count to reach. Published:
    # conditioning augmentation by noise of a level that each image draws, embedded like the time, from the whole
    # schedule; cosine schedule; no code and no weights. Network, batch and steps are those of ADM's upsampler here, and
    # so are ours.
    "cdm_upsampler_64_256": unet(
        256, 192, ADM_256, 2, (32, 16, 8), None, 4,  COSINE, LABEL,         500_000, 256, 1e-4,
        low_res=FROM_64.replace(max_noise_level=999)),

    # GLIDE, the released (filtered) networks, each with a text transformer of its own; steps and batches of the large
    # ones, of which the base then drops texts in one of five; guidance scale 3. The upsampler is sampled in 27 steps.
    "glide_base": unet(
        64,  192, ADM_64,  3, (32, 16, 8), 64, None, COSINE, GLIDE_TEXT, 2_500_000, 2048, 1e-4,
        dropout=0.1, text_conditioning="cross_attention"),
    "glide_upsampler": unet(
        256, 192, ADM_256, 2, (32, 16, 8), 64, None, LINEAR, GLIDE_TEXT.replace(cond_drop_prob=0.0), 1_600_000, 512,
        1e-4, dropout=0.1, text_conditioning="cross_attention", low_res=FROM_64),

    # LDM, unconditional, on latents of 64² x 3 of vq-f4: `configs/latent-diffusion/ffhq-ldm-vq-4.yaml`, table 12.
    "ldm_ffhq_f4": unet(
        64,  224, (1, 2, 3, 4), 2, (32, 16, 8), 32, None, LATENT, UNCONDITIONAL, 635_000, 42, 8.4e-5,
        scale_shift_norm=False, resample_in_blocks=False),
    # LDM by class on latents of 32² x 4 of vq-f8: `configs/latent-diffusion/cin-ldm-vq-f8.yaml`. Steps are ours.
    "ldm_imagenet_f8": unet(
        32,  256, (1, 2, 4),    2, (32, 16, 8), 32, None, LATENT, LABEL, 500_000, 48, 48e-6, in_channels=4,
        scale_shift_norm=False, resample_in_blocks=False, text_conditioning="spatial_transformer", class_token_dim=512),
    # LDM by class on latents of 64² x 3 of vq-f4, the released `cin256-v2` with a null label; table 12.
    "ldm_imagenet_f4": unet(
        64,  192, (1, 2, 3, 5), 2, (32, 16, 8), None, 1,  LATENT, LABEL.replace(cond_drop_prob=0.1), 178_000, 1200,
        1e-4, scale_shift_norm=False, resample_in_blocks=False, text_conditioning="spatial_transformer",
        class_token_dim=512),
    # LDM by text on latents of 32² x 4 of kl-f8, 1.4 billion with its text encoder; table 15. That encoder stands
    # outside here; its states have 1,280 features.
    "ldm_text_to_image": unet(
        32,  320, (1, 2, 4, 4), 2, (32, 16, 8), None, 8,  LATENT.replace(beta_start=0.00085, beta_end=0.012),
        DiffusionConditions(conditions=("text_states",), cond_drop_prob=0.1, text_states_dim=1280), 390_000, 680, 1e-4,
        in_channels=4, scale_shift_norm=False, resample_in_blocks=False, text_conditioning="spatial_transformer"),

    # Palette: ADM's network without a label, the other image concatenated. Published: rate 1e-4 after 10,000 steps,
    # 2,000 noise levels, 1,000 steps at sampling, on a schedule fitted to them, where ours takes every second level;
    # one network for four tasks. Ours sees the mask as a channel more.
    "palette": unet(
        256, 256, ADM_256, 2, (32, 16, 8), 64, None,
        SIMPLE.replace(beta_start=1e-6, beta_end=1e-2, num_train_timesteps=2000), UNCONDITIONAL, 1_000_000, 1024, 1e-4,
        degradation=DegradationConfig(tasks=("inpainting", "uncropping", "colorization", "jpeg")), warmup_steps=10_000),
}
# fmt: on
