"""Published networks and trainings, a row each: networks have the published number of parameters.

Where a number was not published, the row says that it is ours. All train in bf16, which is ours too: some were
published in fp16 with a scale of the loss, others in fp32. `cascade plan` counts them; `published.py` makes recipes.

Autoencoders: VQ-GAN is of Esser et al. (2021), LDM of Rombach et al. (2022); VQ-VAE and dVAE say theirs below. The
first two publish a batch for each GPU and a learning rate for each image of the batch (4.5e-6), constant, under Adam
with betas (0.5, 0.9); the number of GPUs, 8, and of steps is ours. They need the weights of VGG-16 and LPIPS in one
safetensors file. Codebook and commitment loss have their weights of the paper; the published code has the two the other
way round.

Classifiers of noisy images, for guidance by their gradient: Dhariwal and Nichol (2021), appendix H, and the flags of
openai/guided-diffusion, which are those of 128²: 300,000 steps of 256 images, rate 3e-4 down to nothing, weight decay
0.05, random crops. The others take the same here; that crops are shifts by at most an eighth of the side is ours.

Diffusion: DDPM is Ho et al. (2020); IDDPM, Nichol and Dhariwal (2021); ADM, Dhariwal and Nichol (2021), its tables of
hyperparameters and the flags of openai/guided-diffusion; CDM, Ho et al. (2022); GLIDE, Nichol et al. (2022) and
openai/glide-text2im; LDM, Rombach et al. (2022) and the configurations of CompVis/latent-diffusion; Stable Diffusion,
CompVis/stable-diffusion and its model card; DiT, Peebles and Xie (2023); EDM, Karras et al. (2022), table 7, and
NVlabs/edm; DALL-E 2, Ramesh et al. (2022), appendix C; Imagen, Saharia et al. (2022a), appendix F; Palette, Saharia et
al. (2022b). A label is dropped where guidance needs it, and its table then has one row
more: those of ADM need none. ImageNet has 1,000 classes; GLIDE's vocabulary 50,257 words, of which a text has 128."""

from typing import Any, Literal, NamedTuple

from components.configuration.conditions import DiffusionConditions, PaddedTextConfig
from components.configuration.diffusion import (
    DegradationConfig,
    DiffusionTraining,
    DiscreteNoise,
    DiscreteProcess,
    EDMProcess,
    LowResConfig,
)
from components.configuration.networks import DiTConfig, GaussianConfig, GradientCodesConfig, GumbelCodesConfig
from components.configuration.trainings import AutoencoderTraining, ClassifierTraining

ADM_64, ADM_128, ADM_256, ADM_512 = (1, 2, 3, 4), (1, 1, 2, 3, 4), (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
NORM_GROUPS = 32  # in all code of OpenAI, LDM and DDPM
# The best time between checkpoints is √(2 · seconds that one holds training · seconds between faults) (Young, 1974): 20
# minutes for 2 seconds, in which a GPU copies 22 GB to its host, and a fault in four days.
CHECKPOINT_MINUTES = 20.0
STREAMS = 192  # 64 · 3: read once an epoch by up to 64 workers in powers of two
LARGE = {"compile_network": True, "checkpoint_minutes": CHECKPOINT_MINUTES, "streams": STREAMS}
GPUS = 8
RATE_PER_IMAGE = 4.5e-6
F4, F8, F8_VQ, F16 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)

# Of DDPM and Palette: noise is predicted, the variance is fixed. LDM has a schedule of its own.
SIMPLE = DiscreteProcess(schedule="linear", prediction_type="epsilon", variance="fixed_large", min_snr_gamma=None)
LATENT = SIMPLE.replace(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
# Of ADM, IDDPM and GLIDE: noise and a variance are predicted and the bound is a small part of the loss.
LINEAR = SIMPLE.replace(variance="learned_range", loss="hybrid")
COSINE = LINEAR.replace(schedule="cosine")

DDPM: dict[str, Any] = {"scale_shift_norm": False, "norm_eps": 1e-6, "frequency_shift": 1, "sines_first": True}
LDM: dict[str, Any] = {"scale_shift_norm": False, "resample_in_blocks": False}  # of its U-Nets
LDM_ATTENTION = LDM | {"text_conditioning": "spatial_transformer"}

UNCONDITIONAL = DiffusionConditions(conditions=(), cond_drop_prob=0.0)
LABEL = DiffusionConditions(conditions=("label",), cond_drop_prob=0.0)
GLIDE_TEXT = DiffusionConditions(
    conditions=("text",),
    cond_drop_prob=0.2,
    text=PaddedTextConfig(text_dim=512, text_layers=16, text_heads=8, text_padding="learned"),
)
DALLE_2_IMAGE = DiffusionConditions(
    conditions=("text", "image_embedding"),
    image_embedding_dim=1024,
    text=PaddedTextConfig(text_dim=2048, text_layers=24, text_heads=32, text_padding="learned"),
)
T5_STATES = DiffusionConditions(conditions=("text_states",), cond_drop_prob=0.1, text_states_dim=4096)  # of T5-XXL
# Of upsamplers that see the low-resolution image as it is.
FROM_64, FROM_128 = (LowResConfig(low_res_resolution=side, max_noise_level=0) for side in (64, 128))
FROM_256 = LowResConfig(low_res_resolution=256)  # noised


def published(steps: int, batch: int, rate: float, **changes: Any) -> dict[str, Any]:
    """Steps, batch and rate of a row, by name; Adam at a constant rate unless a row says otherwise.
    Nobody clips gradients but DDPM, and of the priors DALL-E and minDALL-E."""
    numbers = {"total_steps": steps, "global_batch_size": batch, "learning_rate": rate, "final_lr_fraction": 1.0}
    numbers |= {"warmup_steps": 0, "betas": (0.9, 0.999), "weight_decay": 0.0, "ema_decay": 0.0, "precision": "bf16"}
    numbers |= {"max_grad_norm": None, "log_every": 100, "checkpoint_every": 5000, "sample_every": 5000}
    return numbers | LARGE | changes


class PaperAutoencoder(NamedTuple):
    """A published autoencoder: a training at the size of the paper, and the source of the numbers."""

    summary: str  # what it is, and where its numbers are from
    training: AutoencoderTraining


# fmt: off
def first_stage(
    summary: str,
    codes: int | None,  # moved by gradient; None: a Gaussian
    latent_channels: int, channel_mult: tuple[int, ...], attention_resolutions: tuple[int, ...],
    batch_per_gpu: int, adversarial_weight: float, discriminator_start: int, discriminator_layers: int, **more: Any,
) -> PaperAutoencoder:
    """A row of VQ-GAN or LDM; `Normalize` of both is in modules/diffusionmodules/model.py."""
    batch, bottleneck = GPUS * batch_per_gpu, GaussianConfig()
    if codes is not None:
        bottleneck = GradientCodesConfig(codebook_size=codes, l2_normalize=False)
    return PaperAutoencoder(summary, AutoencoderTraining.of(
        resolution=256, channels=128, channel_mult=channel_mult, num_res_blocks=2,
        attention_resolutions=attention_resolutions, latent_channels=latent_channels, norm_groups=NORM_GROUPS,
        bottleneck=bottleneck, kl_weight=1e-6 if codes is None else 1.0,
        perceptual_network="vgg16_lpips", perceptual_weights_uri="vgg16_lpips.safetensors",
        adversarial_weight=adversarial_weight, discriminator_start=discriminator_start,
        discriminator_layers=discriminator_layers,
        **published(500_000, batch, batch * RATE_PER_IMAGE, betas=(0.5, 0.9)), **more))


AUTOENCODERS: dict[str, PaperAutoencoder] = {
    # codes, latent channels, levels, attention, batch of a GPU; adversarial weight, start and layers
    "vqgan_imagenet_f16_1024": first_stage(
        "VQ-GAN, 256² to 16² tokens of 1,024 codes: taming-transformers, `configs/imagenet_vqgan.yaml`.",
        1024, 256, F16, (16,), 3, 0.8, 250_000, 3),
    "vqgan_imagenet_f16_16384": first_stage(
        "VQ-GAN, 256² to 16² tokens of 16,384 codes: `model.yaml` next to its weights; the batch is that of the other.",
        16_384, 256, F16, (16,), 3, 0.75, 0, 2),
    "vqgan_imagenet_depth_f16_1024": first_stage(
        "VQ-GAN of depth, 256² to 16² tokens of 1,024 codes: taming-transformers, `configs/imagenetdepth_vqgan.yaml`.",
        1024, 256, F16, (16,), 3, 0.75, 50_000, 3, member="depth", image_channels=1),
    "vqgan_coco_segmentation_f16_1024": first_stage(
        "VQ-VAE of maps of 183 classes, 256² to 16² tokens: taming-transformers, `configs/coco_cond_stage.yaml`.",
        1024, 256, F16, (16,), 12, 0.0, 0, 3, member="mask", image_channels=183, reconstruction="classes",
        perceptual_weight=0.0),
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
        AutoencoderTraining.of(
            resolution=256, channels=128, channel_mult=F8, num_res_blocks=2, latent_channels=128,
            reconstruction="logit_laplace",
            bottleneck=GumbelCodesConfig(codebook_size=8192, codebook_init="random"), kl_weight=6.6,
            kl_warmup_steps=5000, temperature_steps=150_000, perceptual_network="none", adversarial_weight=0.0,
            **published(
                3_000_000, 512, 1e-4, lr_decay="cosine", final_lr_fraction=0.0125, weight_decay=1e-4,
                ema_decay=0.999))),
    # Published: Adam, rate 2e-4, 250,000 steps of 128 images, two strided convolutions and two residual blocks 256 wide
    # on each side. Ours halves as often and has residual blocks at every resolution, so there is no count to reach.
    "vqvae_imagenet_128": PaperAutoencoder(
        "VQ-VAE, 128² to 32² tokens of 512 codes, trained as in section 4.1 of van den Oord et al. (2017).",
        AutoencoderTraining.of(
            resolution=128, channels=64, channel_mult=(1, 2, 4), num_res_blocks=1, latent_channels=64,
            reconstruction="mse", bottleneck=GradientCodesConfig(codebook_size=512, l2_normalize=False),
            perceptual_network="none", adversarial_weight=0.0, **published(250_000, 128, 2e-4))),
}


def classifier(
    resolution: int,  # pixels
    channel_mult: tuple[int | float, ...], num_res_blocks: int, schedule: Literal["linear", "cosine"],
) -> ClassifierTraining:
    """A row of the table: levels, blocks and schedule differ, all else is shared."""
    return ClassifierTraining.of(
        resolution=resolution, model_channels=128, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
        attention_resolutions=(32, 16, 8), head_dim=64, norm_groups=NORM_GROUPS,
        process=DiscreteNoise(schedule=schedule), max_shift=resolution // 8, mirror=True,
        **published(300_000, 256, 3e-4, final_lr_fraction=0.0, weight_decay=0.05))


PAPER_CLASSIFIERS: dict[str, ClassifierTraining] = {
    # side, levels, blocks, schedule of its model
    "adm_classifier_64": classifier(64, ADM_64, 4, "cosine"),  # twice as deep as the others
    "adm_classifier_128": classifier(128, ADM_128, 2, "linear"),
    "adm_classifier_256": classifier(256, ADM_256, 2, "linear"),
    "adm_classifier_512": classifier(512, ADM_512, 2, "linear"),
}


def unet(
    resolution: int,  # pixels, or sides of latents
    model_channels: int, channel_mult: tuple[int | float, ...], num_res_blocks: int,
    attention_resolutions: tuple[int, ...], head_dim: int | None, num_heads: int | None,
    process: DiscreteProcess | EDMProcess, conditioning: DiffusionConditions,
    total_steps: int, global_batch_size: int, learning_rate: float, **changes: Any,
) -> DiffusionTraining:
    """A row of the table; all rows have 32 groups a norm, Adam at a constant rate, a slow average."""
    own = published(total_steps, global_batch_size, learning_rate, ema_decay=0.9999)
    return DiffusionTraining.of(
        resolution=resolution, model_channels=model_channels, channel_mult=channel_mult,
        num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, head_dim=head_dim,
        num_heads=num_heads, norm_groups=NORM_GROUPS, process=process, conditioning=conditioning, **own | changes)


PAPER_DIFFUSION: dict[str, DiffusionTraining] = {
    # side, width, levels, blocks, attention, head_dim, num_heads, process, conditions, steps, batch, rate

    # DDPM: appendix B and hojonathanho/diffusion, `run_cifar.py`, which clips at 1; norms, times and padding
    # are those of its TensorFlow; sampled in 1,000 steps.
    "ddpm_cifar_10": unet(
        32,  128, (1, 2, 2, 2), 2, (16,), None, 1, SIMPLE, UNCONDITIONAL, 800_000, 128, 2e-4,
        dropout=0.1, **DDPM, resample_in_blocks=False, pads_end=True, warmup_steps=5000, max_grad_norm=1.0),
    # Improved DDPM at 4,000 noise levels, which its network sees as times below 1,000; sampled in 250 steps.
    "iddpm_imagenet_64": unet(
        64,  128, ADM_64, 3, (16, 8), None, 4, COSINE.replace(num_train_timesteps=4000, rescale_time=True),
        UNCONDITIONAL, 1_500_000, 128, 1e-4, resample_in_blocks=False),

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

    # ADM's upsamplers. That to 512² has six levels, as the one to 256².
    "adm_upsampler_64_256": unet(
        256, 192, ADM_256, 2, (32, 16, 8), None, 4,  LINEAR, LABEL,         500_000, 256, 1e-4, low_res=FROM_64),
    "adm_upsampler_128_512": unet(
        512, 192, ADM_256, 2, (32, 16),    64, None, LINEAR, LABEL,       1_050_000, 256, 1e-4, low_res=FROM_128),
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
        64,  224, (1, 2, 3, 4), 2, (32, 16, 8), 32, None, LATENT, UNCONDITIONAL, 635_000, 42, 8.4e-5, **LDM),
    # LDM by class on latents of 32² x 4 of vq-f8: `configs/latent-diffusion/cin-ldm-vq-f8.yaml`. Steps are ours.
    "ldm_imagenet_f8": unet(
        32,  256, (1, 2, 4),    2, (32, 16, 8), 32, None, LATENT, LABEL, 500_000, 48, 48e-6, in_channels=4,
        **LDM_ATTENTION, class_token_dim=512),
    # LDM by class on latents of 64² x 3 of vq-f4, the released `cin256-v2` with a null label; table 12.
    "ldm_imagenet_f4": unet(
        64,  192, (1, 2, 3, 5), 2, (32, 16, 8), None, 1,  LATENT, LABEL.replace(cond_drop_prob=0.1), 178_000, 1200,
        1e-4, **LDM_ATTENTION, class_token_dim=512),
    # LDM by text on latents of 32² x 4 of kl-f8, 1.4 billion with its text encoder; table 15. That encoder stands
    # outside here; its states have 1,280 features.
    "ldm_text_to_image": unet(
        32,  320, (1, 2, 4, 4), 2, (32, 16, 8), None, 8,  LATENT.replace(beta_start=0.00085, beta_end=0.012),
        DiffusionConditions(conditions=("text_states",), cond_drop_prob=0.1, text_states_dim=1280), 390_000, 680, 1e-4,
        in_channels=4, **LDM_ATTENTION),

    # Stable Diffusion v1 by text on latents of 64² x 4 of 512² images: `configs/stable-diffusion/v1-inference.yaml`.
    # Steps are those of v1-4 in four stages: there the first has 256² images, and the last alone drops texts.
    "stable_diffusion_v1": unet(
        64,  320, (1, 2, 4, 4), 2, (64, 32, 16), None, 8, LATENT.replace(beta_start=0.00085, beta_end=0.012),
        DiffusionConditions(conditions=("text_states",), cond_drop_prob=0.1, text_states_dim=768), 1_171_000, 2048,
        1e-4, in_channels=4, **LDM_ATTENTION, weight_decay=0.01, warmup_steps=10_000),

    # EDM: the network of ADM, and DDPM++; batches of 4,096 and 512, in which 2,500 and 200 million images are seen, 10
    # million of them while the rate rises; averages with half-lives of 50 and 0.5 million. Published, DDPM++ begins at
    # other random weights and learns augmented images, whose augmentation it is told.
    "edm_imagenet_64": unet(
        64,  192, ADM_64, 3, (32, 16, 8), 64, None, EDMProcess(), LABEL, 610_352, 4096, 1e-4, dropout=0.1,
        warmup_steps=2441, ema_decay=0.5 ** (4096 / 50e6)),
    "edm_cifar_10": unet(
        32,  128, (2, 2, 2), 4, (16,), None, 1, EDMProcess(), UNCONDITIONAL, 390_625, 512, 1e-3, dropout=0.13,
        **DDPM, plus_plus=True, warmup_steps=19_531, ema_decay=0.5 ** (512 / 0.5e6)),

    # DALL-E 2: GLIDE's network of 3.5 billion parameters, with an image's embedding; upsamplers without attention,
    # trained on windows. Published, that embedding is four tokens more, and it is dropped in a tenth and the text in
    # half of the samples; low-resolution images are blurred, then degraded by BSR, where ours are noised.
    "dalle_2_decoder": unet(
        64,  512, ADM_64, 3, (32, 16, 8), 64, None, COSINE, DALLE_2_IMAGE, 800_000, 2048, 1.2e-4, dropout=0.1,
        text_conditioning="cross_attention"),
    "dalle_2_upsampler_256": unet(
        256, 320, ADM_64, 3, (), 64, None, COSINE, UNCONDITIONAL, 1_000_000, 1024, 1.2e-4, dropout=0.1, crop_size=64,
        low_res=FROM_64.replace(max_noise_level=500)),
    "dalle_2_upsampler_1024": unet(
        1024, 192, ADM_256, 2, (), 64, None, LINEAR, UNCONDITIONAL, 1_000_000, 512, 1e-4, crop_size=256,
        low_res=FROM_256),

    # Imagen: states of a frozen T5-XXL join every attention of a U-Net of Improved DDPM. Its base learns by Adafactor.
    # Published, upsamplers are efficient U-Nets: 2, 4, 8 and 8 blocks from a half of the resolution down, one skip a
    # level; ours have as many at each level, and together about as many parameters. That to 1024² learns windows, so
    # that no attention of ours may see the text there, only its mean; the published one keeps attention to the text.
    "imagen_base": unet(
        64,  512, ADM_64, 3, (32, 16, 8), 64, None, SIMPLE.replace(schedule="cosine"), T5_STATES, 2_500_000, 2048, 1e-4,
        resample_in_blocks=False, text_conditioning="cross_attention", warmup_steps=10_000),
    "imagen_upsampler_256": unet(
        256, 128, (1, 1, 2, 4, 8), 5, (16,), 64, None, SIMPLE.replace(schedule="cosine"), T5_STATES, 2_500_000, 2048,
        1e-4, text_conditioning="cross_attention", low_res=FROM_64.replace(max_noise_level=999), warmup_steps=10_000),
    "imagen_upsampler_1024": unet(
        1024, 128, (1, 1, 2, 4, 8), 4, (), 64, None, SIMPLE, T5_STATES, 2_500_000, 2048, 1e-4, crop_size=256,
        low_res=FROM_256.replace(max_noise_level=999), warmup_steps=10_000),

    # DiT-XL/2 by class on latents of 32² x 4 of kl-f8: section 4, and `train.py` of facebookresearch/DiT, which mirrors
    # half of the images; ours doesn't. Published weights are of 7,000,000 steps, the paper's comparisons of 400,000.
    "dit_imagenet_256": DiffusionTraining.of(
        resolution=32, in_channels=4, network=DiTConfig(patch_size=2, model_dim=1152, num_layers=28, num_heads=16),
        process=LINEAR, conditioning=LABEL.replace(cond_drop_prob=0.1),
        **published(7_000_000, 256, 1e-4, ema_decay=0.9999)),

    # Palette: ADM's network without a label, the other image concatenated. Published: rate 1e-4 after 10,000 steps,
    # 2,000 noise levels, 1,000 steps at sampling, on a schedule fitted to them, where ours takes every second level;
    # one network for four tasks. Ours sees the mask as a channel more.
    "palette": unet(
        256, 256, ADM_256, 2, (32, 16, 8), 64, None,
        SIMPLE.replace(beta_start=1e-6, beta_end=1e-2, num_train_timesteps=2000), UNCONDITIONAL, 1_000_000, 1024, 1e-4,
        degradation=DegradationConfig(tasks=("inpainting", "uncropping", "colorization", "jpeg")), warmup_steps=10_000),
}
# fmt: on
