"""Every stage at its smallest, on the procedural set: what tests run, and the impatient."""

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import CascadeSampling, DiffusionSampling
from components.configuration.trainings import AutoencoderTraining, PriorTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.shapes import CascadeRecipe


def smoke() -> CascadeRecipe:
    """Colored solids: the whole cascade in about four minutes on two cores, most of it start-up."""
    return CascadeRecipe(
        name="smoke",
        images=ImagesConfig(
            source="scenes",
            resolution=32,
            samples_per_shard=128,
            holdout_fraction=0.1,
            vocab_size=300,
            text_length=12,
            limit=512,
        ),
        tokenizer=tokenizer(),
        prior=prior(),
        base=base(),
        upsamplers=(upsampler(),),
        sampling=CascadeSampling(
            base=DiffusionSampling(num_inference_steps=20), upsamplers=(DiffusionSampling(num_inference_steps=10),)
        ),
        samples=SamplesConfig(measured_samples=64, images_per_class=3, num_prompts=3, images_per_prompt=3),
        evaluation=EvaluationConfig(reference_samples=256, held_out_samples=48),
    )


def tokenizer() -> AutoencoderTraining:
    """VQ-GAN without a perceptual network, 32² pixels to 8² tokens of 128 codes."""
    return AutoencoderTraining.of(
        resolution=32,
        channels=16,
        channel_mult=(1, 2, 2),  # 32 -> 8: 64 tokens an image
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=128,
        codebook_dim=8,
        perceptual_network="none",
        discriminator_channels=16,
        discriminator_layers=2,
        total_steps=60,
        global_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=10,
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=25,
        sample_every=60,
    )


def prior() -> PriorTraining:
    """Two layers over the 64 tokens."""
    return PriorTraining.of(
        model_dim=64,
        num_layers=2,
        num_heads=4,
        conditions=("label", "text"),
        cond_drop="independent",
        cond_drop_prob=0.2,
        total_steps=60,
        global_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=10,
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=25,
        sample_every=60,
    )


def base() -> DiffusionTraining:
    """A 16² base."""
    return DiffusionTraining.of(
        resolution=16,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        conditions=("label", "text"),
        cond_drop="independent",
        cond_drop_prob=0.2,
        total_steps=80,
        global_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=10,
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=25,
        sample_every=80,
    )


def upsampler() -> DiffusionTraining:
    """16² to 32²."""
    return DiffusionTraining.of(
        resolution=32,
        low_res_resolution=16,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        total_steps=60,
        global_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=10,
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=25,
        sample_every=60,
    )
