"""Systems of the lecture at the size of minutes on two cores; the demo and `smoke`.
Arguments are what several recipes differ in; a number that a single recipe changes stands there, by `replace`."""

from typing import Any, Literal, TypeVar

from components.configuration.diffusion import DiffusionTraining
from components.configuration.networks import EMACodesConfig, GumbelCodesConfig, MaskedTransformerConfig
from components.configuration.optimization import Training
from components.configuration.sampling import (
    CascadeSampling,
    DiffusionSampling,
    RerankerSampling,
    TransformerSampling,
)
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
from components.evaluation.agreement import AgreementConfig
from components.evaluation.obedience import ObedienceConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.shapes import AgreementRecipe, CascadeRecipe, ObedienceRecipe

Trained = TypeVar("Trained", bound=Training)
ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=15)  # its noise cures the grain of brief training
ANCESTRAL_250 = DiffusionSampling(sampler="ddpm", num_inference_steps=250)
SKETCH = DiffusionSampling(sampler="sde_dpm_solver_pp", num_inference_steps=15)  # where x_0 is predicted
# From the base's image at a noise of 4.7 times its signal: 98 in place of 116 from noise alone in eight steps.
LAST_TWELVE = SKETCH.replace(num_inference_steps=21, strength=0.57)


def optimized(
    steps: int, batch: int, rate: float, *, saves: int = 3, previews: int = 2, ema_decay: float = 0.99
) -> dict[str, Any]:
    """Optimization by name: steps, images a step, peak rate; checkpoints and previews on the way."""
    numbers = {"total_steps": steps, "global_batch_size": batch, "learning_rate": rate, "ema_decay": ema_decay}
    return numbers | {"checkpoint_every": steps // saves, "sample_every": steps // previews}


# fmt: off
def emoji(resolution: int = 64) -> ImagesConfig:
    """OpenMoji's 3,773 images, `resolution` pixels wide; equal numbers are ingested once."""
    return ImagesConfig(
        source="openmoji", resolution=resolution, samples_per_shard=256, holdout_fraction=0.1,
        vocab_size=1024, text_length=16)


def scenes() -> ImagesConfig:
    """Colored solids of 32² pixels with exact depth maps."""
    return emoji(32).replace(source="scenes", vocab_size=300, limit=3072)


def autoencoder() -> AutoencoderTraining:
    """64² pixels to 8² tokens of 512 codes by mean squared difference alone."""
    return AutoencoderTraining.of(
        resolution=64, channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=1, latent_channels=64,
        patch_shortcut=True, bottleneck=EMACodesConfig(codebook_size=512, codebook_dim=8, codebook_decay=0.97),
        reconstruction="mse",  # a mean keeps more color than l1's median
        perceptual_network="none", perceptual_weight=0.0, adversarial_weight=0.0,
        **optimized(650, 8, 2e-3) | {"checkpoint_every": 150})


def autoencoder_32() -> AutoencoderTraining:
    """32² pixels to 8² tokens of 128 codes, by the same loss."""
    return autoencoder().replace(
        resolution=32, channels=32, channel_mult=(1, 2, 2), latent_channels=32, codebook_size=128,
        **optimized(300, 16, 2e-3, saves=2))


def smooth_autoencoder() -> AutoencoderTraining:
    """32² pixels to 8² x 8 Gaussian latents, the first stage of scenes."""
    # Two solids' colors, exchanged, then change 36 % of the latents' variance; at 1e-6 they change 22 %.
    return autoencoder_32().replace(
        channels=16, channel_mult=(1, 2, 4), latent_channels=8, bottleneck="gaussian", kl_weight=5e-3,
        **optimized(500, 16, 2e-3, saves=2))


def adversarial(training: AutoencoderTraining, *, start: int) -> AutoencoderTraining:
    """The same with a perceptual loss and, from step `start` on, a patch discriminator's."""
    return training.replace(
        perceptual_network="efficientnet_lite1", perceptual_weight=0.1, adversarial_weight=0.4,
        discriminator_channels=16, discriminator_layers=2, discriminator_start=start)


def vae() -> AutoencoderTraining:
    """32² pixels to Gaussian latents of 4² x 16, trained on the bound of 8-bit images."""
    return autoencoder().replace(
        resolution=32, channels=32, channel_mult=(1, 2, 2, 2), latent_channels=16, bottleneck="gaussian",
        reconstruction="discretized_logistic", kl_warmup_steps=200, total_steps=700, global_batch_size=16,
        learning_rate=1e-3, betas=(0.9, 0.99))


def vae_gan() -> AutoencoderTraining:
    """First stage of latent diffusion: 64² pixels to Gaussian latents of 16² x 4.
    A divergence that only keeps the latents near the origin (Rombach et al., 2022, appendix G), so that the
    reconstruction decides what they hold."""
    return adversarial(autoencoder(), start=700).replace(
        channel_mult=(1, 2, 4), latent_channels=4, bottleneck="gaussian", kl_weight=1e-6,
        total_steps=1500, checkpoint_every=300, sample_every=750)


def dvae() -> AutoencoderTraining:
    """Gumbel-softmax, hardened while the divergence gains weight (Ramesh et al., 2021)."""
    return autoencoder().replace(
        bottleneck=GumbelCodesConfig(codebook_size=512, codebook_dim=64),
        # Beside patch shortcuts a scale for each value leaves 8 % of the codes in use, one an image 44 %.
        reconstruction="logit_laplace", shared_scale=True,
        kl_weight=6.6,  # as published; after 150 steps 98 codes' worth are in use, and 51 with 1
        kl_warmup_steps=600, temperature_steps=1200, total_steps=1300, sample_every=650)


def transformer() -> PriorTraining:
    """Transformer by class over the 64 tokens of an image."""
    return PriorTraining.of(
        model_dim=192, num_layers=4, num_heads=6, dropout=0.1, conditions=("label",), cond_drop_prob=0.1,
        weight_decay=0.05, precision="bf16", **optimized(450, 32, 1e-3))


def masked_transformer() -> MaskedPriorTraining:
    """MaskGIT's transformer of the same size, batch and steps."""
    causal = transformer()
    network = MaskedTransformerConfig(model_dim=192, num_layers=4, num_heads=6, dropout=0.1)
    return MaskedPriorTraining(
        network=network, conditioning=causal.conditioning, optimization=causal.optimization)


def pixelcnn() -> PixelTraining:
    """PixelCNN by class over the sub-pixels of 16² images."""
    return PixelTraining.of(
        network="pixelcnn", resolution=16, channels=48, num_layers=7, dropout=0.1, conditions=("label",),
        optimizer="muon", **optimized(450, 16, 6e-3))


def as_row_lstm(training: PixelTraining) -> PixelTraining:
    """The same with a Row LSTM in the PixelCNN's place."""
    return training.replace(network="row_lstm", num_layers=4, kernel_size=3)


def gan() -> GANTraining:
    """Residual GAN by class at 32²."""
    return GANTraining.of(
        resolution=32, channels=24, channel_mult=(1, 2, 4), noise_dim=64,
        discriminator_channels=24, discriminator_channel_mult=(1, 2, 4),
        max_grad_norm=10.0,  # gradients of a hinge loss under spectral norm have norms of 3 to 5
        discriminator_learning_rate=1e-3, **optimized(2000, 32, 5e-4, saves=4))


def contrastive(resolution: int = 16, *, steps: int = 300) -> ContrastiveTraining:
    """Captions and images in a common space; an image of any resolution in pixels is 16² patches."""
    return ContrastiveTraining.of(
        resolution=resolution, channels=32, channel_mult=(1, 2), num_res_blocks=1, patch_size=resolution // 16,
        embedding_dim=64, text_dim=64, max_shift=resolution // 16,
        weight_decay=0.05, **optimized(steps, 128, 1e-3, saves=2, previews=1))


def classifier(
    resolution: int, model_channels: int, channel_mult: tuple[int, ...], attention_resolution: int,
    *, noisy: bool, steps: int,
) -> ClassifierTraining:
    """Classifier of noisy images, for guidance, or of clean images, for judgment."""
    return ClassifierTraining.of(
        resolution=resolution, model_channels=model_channels, channel_mult=channel_mult, num_res_blocks=1,
        attention_resolutions=(attention_resolution,), noisy=noisy,
        precision="bf16", **optimized(steps, 64, 1e-3, saves=2, previews=1))


def diffusion_prior() -> DiffusionPriorTraining:
    """DALL-E 2's prior from a caption to the embedding of an image of 16²."""
    return DiffusionPriorTraining.of(
        resolution=16, model_dim=128, num_layers=4, num_heads=4, **optimized(300, 64, 1e-3, saves=2, previews=1))


def unet(
    resolution: int, model_channels: int, channel_mult: tuple[int, ...], attention_resolutions: tuple[int, ...],
    *, steps: int, batch: int, rate: float = 1e-3, saves: int = 4,
) -> DiffusionTraining:
    """U-Net by class: v-prediction, min-SNR, cosine schedule; resolutions in pixels, see `optimized`."""
    return DiffusionTraining.of(
        resolution=resolution, model_channels=model_channels, channel_mult=channel_mult,
        attention_resolutions=attention_resolutions,
        precision="bf16", **optimized(steps, batch, rate, saves=saves, ema_decay=0.995))


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
        conditions=(), schedule="linear", prediction_type="epsilon", min_snr_gamma=None, variance="fixed_large")


def as_improved_ddpm(training: DiffusionTraining) -> DiffusionTraining:
    """Improved DDPM (Nichol and Dhariwal, 2021): cosine schedule, learned variance, hybrid loss."""
    return as_ddpm(training).replace(schedule="cosine", variance="learned_range", loss="hybrid")


def openmoji(name: str = "openmoji") -> CascadeRecipe:
    """The cascade of drawings by class and caption, of which other recipes take parts."""
    tokenizer = adversarial(autoencoder(), start=600)
    base = unet(16, 32, (1, 2, 4), (8, 4), steps=1300, batch=24)
    upsampler = unet(64, 16, (1, 2, 4, 4), (), steps=1150, batch=6, saves=5)
    upsampler = upsampler.replace(low_res_resolution=16, max_noise_level=400, prediction_type="sample", ema_decay=0.99)
    judge = classifier(32, 16, (1, 2, 4), 8, noisy=False, steps=250)
    agreement = AgreementRecipe(
        # The class of 72 % of held-out images is seen after half a minute of one core.
        judge=judge.replace(
            max_shift=2, mirror=True, global_batch_size=32, learning_rate=2e-3, ema_decay=0.98, precision="fp32"),
        # The caption of 41 % of held-out images is found among 128, after as long.
        matcher=contrastive(32, steps=150).replace(ema_decay=0.98), measure=AgreementConfig(samples=64))
    sampling = CascadeSampling(
        prior=TransformerSampling(guidance_scale=1.5, temperature=0.8, top_k=100),  # 79 in place of 98 at 1
        base=SKETCH.replace(num_inference_steps=14, guidance_scale=1.5),
        upsamplers=(LAST_TWELVE.replace(noise_level=80),))
    return CascadeRecipe(
        name=name, images=emoji(),
        tokenizer=tokenizer.replace(total_steps=1200, checkpoint_every=300, sample_every=600),
        prior=by_class_and_caption(transformer()).replace(global_batch_size=24),
        # x_0 gives flat colors after minutes, where v_prediction leaves grain: 177 in place of 192, and 120 of 187.
        base=by_class_and_caption(base).replace(prediction_type="sample"), upsamplers=(upsampler,),
        sampling=sampling, samples=SamplesConfig(), evaluation=EvaluationConfig(precision="bf16"), agreement=agreement)


def openmoji_hour(name: str = "openmoji_hour") -> CascadeRecipe:
    """The same models in about an hour on two cores, by three to four times the steps."""
    recipe = openmoji(name)
    (upsampler,) = recipe.upsamplers
    return recipe.replace(
        tokenizer=recipe.tokenizer.replace(
            total_steps=3600, checkpoint_every=600, sample_every=1800, discriminator_start=1800),
        prior=recipe.prior.replace(total_steps=1800, checkpoint_every=450, sample_every=900),
        base=recipe.base.replace(total_steps=5200, checkpoint_every=650, sample_every=2600),
        upsamplers=(upsampler.replace(total_steps=4600, checkpoint_every=575, sample_every=2300),))


def described(name: str = "scenes") -> CascadeRecipe:
    """The demo: scenes of 64² by caption, four pairs of a color and a shape in none that is trained on."""
    tokenizer = adversarial(autoencoder(), start=360).replace(optimizer="muon", learning_rate=1e-3)
    base = unet(16, 16, (1, 3, 4), (8, 4), steps=1000, batch=32, rate=5e-3).replace(optimizer="muon")
    upsampler = unet(64, 16, (1, 2, 4, 4), (), steps=600, batch=6, rate=3e-3, saves=5).replace(optimizer="muon")
    return CascadeRecipe(
        name=name, images=emoji().replace(
            source="scenes", vocab_size=512, text_length=12, limit=9000, samples_per_shard=500, held_out_pairs=4),
        tokenizer=tokenizer.replace(total_steps=560, checkpoint_every=140, sample_every=280),
        prior=transformer().replace(
            model_dim=128, num_heads=4, conditions=("text",), positions="learned_2d",
            token_corruption=0.3,  # so that the caption counts, not only the tokens before
            text_loss_weight=1 / 8,  # as DALL-E: of unseen pairs 98 % in place of 92
            optimizer="muon", **optimized(1000, 32, 6e-3)),  # as obedient as after 2,000 steps by AdamW
        reranker=contrastive(),
        base=base.replace(
            head_dim=16, schedule="linear", min_snr_gamma=None, prediction_type="sample", conditions=("text",),
            text_conditioning="spatial_transformer", cond_drop_prob=0.1),
        upsamplers=(upsampler.replace(
            low_res_resolution=16, max_noise_level=400, prediction_type="sample", ema_decay=0.99, conditions=()),),
        sampling=CascadeSampling(
            prior=TransformerSampling(guidance_scale=1.5, temperature=0.8, top_k=100),
            reranker=RerankerSampling(candidates=4),  # of unseen pairs 99 % in place of 94
            # Guided by 3, small colors leave their range: 89 % of them are right in place of 100.
            base=SKETCH.replace(num_inference_steps=14, guidance_scale=1.5),
            # The last six of 14 steps, half of those of drawings: solids are flat. As near, and as obedient.
            upsamplers=(SKETCH.replace(num_inference_steps=14, strength=0.4, noise_level=20),)),
        samples=SamplesConfig(measured_samples=256, images_per_class=1),
        evaluation=EvaluationConfig(precision="bf16", reference_samples=2048),
        obedience=ObedienceRecipe(measure=ObedienceConfig(samples=128, seeds=2)))


def smoke(name: str = "smoke") -> CascadeRecipe:
    """The cascade on colored solids, for tests of the whole system."""
    tokenizer = autoencoder_32().replace(
        channels=16, patch_shortcut=False, codebook_decay=0.99, reconstruction="l1", perceptual_weight=1.0,
        adversarial_weight=0.8, discriminator_channels=16, discriminator_layers=2)
    prior = transformer().replace(model_dim=64, num_layers=2, num_heads=4, dropout=0.0, weight_decay=0.0)
    base = unet(16, 16, (1, 2), (8,), steps=80, batch=32)
    upsampler = unet(32, 16, (1, 2), (), steps=60, batch=16).replace(low_res_resolution=16)
    return CascadeRecipe(
        name=name, images=scenes().replace(samples_per_shard=128, text_length=12, limit=512),
        tokenizer=brief(tokenizer, batch=16, rate=1e-3), prior=brief(by_class_and_caption(prior), batch=32),
        base=brief(by_class_and_caption(base), batch=32, steps=80), upsamplers=(brief(upsampler, batch=16),),
        sampling=CascadeSampling(
            base=DiffusionSampling(num_inference_steps=20), upsamplers=(DiffusionSampling(num_inference_steps=10),)),
        samples=SamplesConfig(measured_samples=64, images_per_class=3, num_prompts=3, images_per_prompt=3),
        evaluation=EvaluationConfig(reference_samples=256, held_out_samples=48))


def by_class_and_caption(training: Trained) -> Trained:
    """The training with class and caption, dropped independently: a prompt has either or both."""
    return training.replace(conditions=("label", "text"), cond_drop="independent", cond_drop_prob=0.2)


def brief(training: Trained, *, batch: int, steps: int = 60, rate: float = 2e-3) -> Trained:
    """A training of seconds, with checkpoints on the way for tests that kill the training."""
    numbers = optimized(steps, batch, rate, previews=1, ema_decay=0.9) | {"checkpoint_every": 25, "log_every": 10}
    return training.replace(warmup_steps=10, precision="fp32", **numbers)
# fmt: on
