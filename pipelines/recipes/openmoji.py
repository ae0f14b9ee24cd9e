"""The demo: every system of the cascade on 3,773 real images, on a laptop, in about a quarter of an hour."""

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import CascadeSampling, DiffusionSampling, TransformerSampling
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    PriorTraining,
)
from components.evaluation.agreement import AgreementConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.shapes import AgreementRecipe, CascadeRecipe

# From the base's image at a noise of 4.7 times its signal: 98 in place of 116 from noise alone in eight steps.
LAST_TWELVE = DiffusionSampling(sampler="sde_dpm_solver_pp", num_inference_steps=21, strength=0.57)


def openmoji() -> CascadeRecipe:
    """OpenMoji images: tokenizer at 64², base at 16², upsampler 16² -> 64²; the demo."""
    return CascadeRecipe(
        name="openmoji",
        images=ImagesConfig(
            source="openmoji",
            resolution=64,
            samples_per_shard=256,
            holdout_fraction=0.1,
            vocab_size=1024,
            text_length=16,
        ),
        tokenizer=tokenizer(),
        prior=prior(),
        base=base(),
        upsamplers=(upsampler(),),
        sampling=CascadeSampling(
            prior=TransformerSampling(guidance_scale=1.5, temperature=0.8, top_k=100),  # 79 in place of 98 at 1
            base=DiffusionSampling(sampler="sde_dpm_solver_pp", num_inference_steps=14, guidance_scale=1.5),
            upsamplers=(LAST_TWELVE.replace(noise_level=80),),
        ),
        samples=SamplesConfig(),
        evaluation=EvaluationConfig(precision="bf16"),
        agreement=AgreementRecipe(judge=judge(), matcher=matcher(), measure=AgreementConfig(samples=64)),
    )


def tokenizer() -> AutoencoderTraining:
    """VQ-GAN, 64² pixels to 8² tokens of 512 codes."""
    return AutoencoderTraining.of(
        resolution=64,
        channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        latent_channels=64,
        patch_shortcut=True,
        codebook_size=512,
        codebook_dim=8,
        perceptual_network="efficientnet_lite1",
        discriminator_channels=16,
        discriminator_layers=2,
        reconstruction="mse",  # a mean keeps more color than l1's median
        perceptual_weight=0.1,
        discriminator_start=600,
        adversarial_weight=0.4,
        codebook_decay=0.97,
        total_steps=1200,
        global_batch_size=8,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=300,
        sample_every=600,
    )


def prior() -> PriorTraining:
    """Transformer over the 64 tokens, asked by class and caption."""
    return PriorTraining.of(
        model_dim=192,
        num_layers=4,
        num_heads=6,
        dropout=0.1,
        conditions=("label", "text"),
        cond_drop="independent",  # images are asked for by class, by caption, or by both
        cond_drop_prob=0.2,
        total_steps=450,
        global_batch_size=24,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=150,
        sample_every=225,
    )


def base() -> DiffusionTraining:
    """The sketch, asked by class and caption."""
    return DiffusionTraining.of(
        resolution=16,
        model_channels=32,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        conditions=("label", "text"),
        cond_drop="independent",  # images are asked for by class, by caption, or by both
        cond_drop_prob=0.2,
        total_steps=1300,
        global_batch_size=24,
        learning_rate=1e-3,
        ema_decay=0.995,
        prediction_type="sample",  # flat colors after minutes, where v_prediction leaves grain: 177 in place of 192
        precision="bf16",
        checkpoint_every=325,
        sample_every=650,
    )


def upsampler() -> DiffusionTraining:
    """16² to 64²; it is told how much noise its low-res image carries."""
    return DiffusionTraining.of(
        resolution=64,
        low_res_resolution=16,
        model_channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        total_steps=1150,
        global_batch_size=6,
        learning_rate=1e-3,
        ema_decay=0.99,
        prediction_type="sample",  # 120 in place of 187
        precision="bf16",
        max_noise_level=400,
        checkpoint_every=230,
        sample_every=575,
    )


def judge() -> ClassifierTraining:
    """Sees the class of 72 % of held-out images, after half a minute of one core."""
    return ClassifierTraining.of(
        resolution=32,
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(8,),
        noisy=False,
        max_shift=2,
        mirror=True,
        total_steps=250,
        global_batch_size=32,
        learning_rate=2e-3,
        ema_decay=0.98,
        checkpoint_every=125,
        sample_every=250,
    )


def matcher() -> ContrastiveTraining:
    """Finds the caption of 41 % of held-out images among 128, after half a minute of one core."""
    return ContrastiveTraining.of(
        resolution=32,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        patch_size=2,
        embedding_dim=64,
        text_dim=64,
        text_layers=2,
        text_heads=4,
        max_shift=2,
        total_steps=150,
        global_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.98,
        checkpoint_every=75,
        sample_every=150,
    )
