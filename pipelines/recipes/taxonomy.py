"""The lecture's taxonomy at a common size: a recipe for each system on the same images of 32².

All train for the same minutes of two cores and are conditioned on nothing. `cascade compare` runs them and sets them
side by side. Steps are estimates for an idle machine; the comparison prints the seconds that trainings took.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from components.configuration.sampling import DiffusionBranchSampling, MaskedTokenSampling, TokenSampling
from components.configuration.trainings import AutoencoderTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes import systems
from pipelines.recipes.diffusion_rows import ANCESTRAL, ANCESTRAL_250
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe
from pipelines.recipes.shapes import OneModelRecipe, SharedParts, TokenBranchRecipe

MINUTES = 3.0  # of two cores, for all trainings of a system together: the one knob
SIDE = 32  # pixels
# Distances are to all training images.
SMALL = SharedParts(
    systems.emoji(SIDE), SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=0), EvaluationConfig()
)
LIKELIHOOD = LikelihoodConfig(samples=256)
BOUND = LIKELIHOOD.replace(timesteps_per_image=100)  # all 1,000: ten times the minutes


class System(NamedTuple):
    """A row of the comparison."""

    branch: str  # of the lecture's taxonomy: how well the density is known of what is sampled first, pixels or codes
    title: str


TRACTABLE, APPROXIMATE, IMPLICIT = "explicit, tractable", "explicit, approximate", "implicit"


def pixelcnn_32() -> OneModelRecipe:
    """Gated PixelCNN over the sub-pixels of 32² images, exact bits/dim."""
    model = systems.pixelcnn().replace(resolution=SIDE, conditions=(), channels=36, global_batch_size=8)
    return SMALL.one_model("pixelcnn_32", timed(model, 150), likelihood=LIKELIHOOD)


def row_lstm_32() -> OneModelRecipe:
    """Row LSTM over the sub-pixels of 32² images, exact bits/dim."""
    model = systems.as_row_lstm(systems.pixelcnn())
    model = model.replace(resolution=SIDE, conditions=(), channels=36, global_batch_size=8)
    return SMALL.one_model("row_lstm_32", timed(model, 390), likelihood=LIKELIHOOD)


def vae_32() -> OneModelRecipe:
    """VAE, Gaussian latents of 4² x 16, its bound in bits/dim."""
    model = timed(systems.vae(), 370)
    model = model.replace(kl_warmup_steps=model.optimization.total_steps // 4)
    return SMALL.one_model("vae_32", model, likelihood=LIKELIHOOD)


def vqvae_pixelcnn_32() -> TokenBranchRecipe:
    """VQ-VAE by squared error, 8² tokens of 128 codes, and a PixelCNN over them."""
    tokenizer = timed(systems.autoencoder_32(), 340, share=0.5)
    prior = timed(systems.pixelcnn().replace(resolution=None, conditions=()), 740, share=0.5)
    return SMALL.token_branch("vqvae_pixelcnn_32", tokenizer, prior, TokenSampling())


def vqgan_transformer_32() -> TokenBranchRecipe:
    """VQ-GAN, 8² tokens of 128 codes, and a transformer over them."""
    prior = systems.transformer().replace(conditions=(), positions="rotary_2d", token_corruption=0.1)
    prior = timed(prior, 210, share=0.5)
    return SMALL.token_branch("vqgan_transformer_32", vqgan(), prior, TokenSampling())


def maskgit_32() -> TokenBranchRecipe:
    """MaskGIT over the tokens of the same VQ-GAN, 12 steps in place of 64."""
    prior = timed(systems.masked_transformer().replace(conditions=()), 210, share=0.5)
    return SMALL.token_branch("maskgit_32", vqgan(), prior, MaskedTokenSampling(num_inference_steps=12))


def gan_32() -> OneModelRecipe:
    """Residual GAN, spectral norm, hinge loss."""
    return SMALL.one_model("gan_32", timed(systems.gan().replace(conditions=()), 320))


def ddpm_32() -> DiffusionStudiesRecipe:
    """DDPM, linear schedule, noise prediction, L_simple; 250 ancestral steps; its bound in bits/dim."""
    base = timed(systems.as_ddpm(systems.diffusion(32)), 170)
    return SMALL.studies("ddpm_32", base, ANCESTRAL_250, likelihood=BOUND)


def ddpm_15_steps_32() -> DiffusionStudiesRecipe:
    """The same DDPM in 15 steps of SDE-DPM-Solver++(2M)."""
    return SMALL.studies("ddpm_15_steps_32", ddpm_32().base, systems.SKETCH, likelihood=BOUND)


def hybrid_32() -> DiffusionStudiesRecipe:
    """Improved DDPM, cosine schedule, learned variance, hybrid loss; 250 steps; its bound in bits/dim."""
    base = timed(systems.as_improved_ddpm(systems.diffusion(32)), 170)
    return SMALL.studies("hybrid_32", base, ANCESTRAL_250, likelihood=BOUND)


def latent_diffusion_32() -> DiffusionBranchRecipe:
    """Latent diffusion in the 8² x 4 latents of a VAE-GAN, 15 ancestral steps."""
    encoder = vqgan().replace(bottleneck="gaussian", latent_channels=4, kl_weight=1e-6)
    base = systems.diffusion().replace(resolution=8, in_channels=4, channel_mult=(1, 2), conditions=())
    base = timed(base, 860, share=0.5)
    once = PrecomputeConfig(columns=("latents",), resolution=SIDE, kept_resolution=8)
    sampling = ANCESTRAL.replace(threshold="none")
    return SMALL.branch("latent_diffusion_32", base, sampling, autoencoder=encoder, precompute=once)


def cascade_32() -> DiffusionBranchRecipe:
    """A base at 16² and an upsampler to 32², 15 and 8 steps of SDE-DPM-Solver++(2M)."""
    base = timed(systems.sketching().replace(conditions=()), 290, share=0.6)
    upsampler = systems.sketching(32).replace(low_res_resolution=16, max_noise_level=300, conditions=())
    upsampler = timed(upsampler, 170, share=0.4)
    enlarging = systems.SKETCH.replace(num_inference_steps=14, strength=0.57, noise_level=50)
    sampling = DiffusionBranchSampling(base=systems.SKETCH, upsamplers=(enlarging,))
    return SMALL.branch("cascade_32", base, sampling, upsamplers=(upsampler,))


TAXONOMY: dict[Callable[[], Any], System] = {
    pixelcnn_32: System(TRACTABLE, "PixelCNN"),
    row_lstm_32: System(TRACTABLE, "Row LSTM"),
    vae_32: System(APPROXIMATE, "VAE"),
    vqvae_pixelcnn_32: System(APPROXIMATE, "VQ-VAE + PixelCNN"),
    vqgan_transformer_32: System(APPROXIMATE, "VQ-GAN + transformer"),
    maskgit_32: System(APPROXIMATE, "MaskGIT"),
    ddpm_32: System(APPROXIMATE, "DDPM, 250 steps"),
    ddpm_15_steps_32: System(APPROXIMATE, "DDPM, 15 steps"),
    hybrid_32: System(APPROXIMATE, "DDPM, hybrid loss"),
    latent_diffusion_32: System(APPROXIMATE, "latent diffusion"),
    cascade_32: System(APPROXIMATE, "cascade"),
    gan_32: System(IMPLICIT, "GAN"),
}


def timed(training: systems.Trained, steps_per_minute: int, *, share: float = 1.0) -> systems.Trained:
    """The training with the steps of its share of MINUTES, and a preview at the end.

    All in fp32: not every processor has bf16, and not all networks gain the same by it.

    Args:
        steps_per_minute: on two cores of a Xeon without bf16, in fp32: four fifths of twice those of one core.
    """
    steps = max(60, round(MINUTES * share * steps_per_minute))
    return training.replace(total_steps=steps, checkpoint_every=-(-steps // 4), sample_every=steps, precision="fp32")


def vqgan() -> AutoencoderTraining:
    """VQ-GAN of 32² pixels and 8² tokens of 128 codes, in half of the minutes."""
    training = timed(systems.autoencoder_32(), 430, share=0.5)
    start = training.optimization.total_steps // 2
    return systems.adversarial(training, start=start).replace(global_batch_size=8)
