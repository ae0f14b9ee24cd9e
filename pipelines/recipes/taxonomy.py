"""The lecture's taxonomy at one size: each system by its own recipe on the same images of 32², trained for the same
minutes of two cores and conditioned on nothing. `cascade compare` runs them and sets them side by side.

Steps are estimates for an idle machine; the comparison prints the seconds that trainings took.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import (
    DiffusionBranchSampling,
    DiffusionSampling,
    MaskedTokenSampling,
    TokenBranchSampling,
    TokenSampling,
)
from components.configuration.trainings import (
    AnyTraining,
    AutoencoderTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.stages.evaluate import EvaluationConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.diffusion_rows import ANCESTRAL, SKETCH, at_32, diffusion, sketching
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe
from pipelines.recipes.discrete_rows import (
    emoji,
    gan,
    masked_transformer,
    pixels,
    scene_tokenizer,
    transformer,
    vae,
)
from pipelines.recipes.shapes import OneModelRecipe, TokenBranchRecipe

MINUTES = 3.0  # of two cores, for all trainings of a system together: the one knob
SIDE = 32  # pixels
IMAGES = emoji(resolution=SIDE)
SAMPLES = SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=0)
EVALUATION = EvaluationConfig()  # to all training images
LIKELIHOOD = LikelihoodConfig(samples=256)
BOUND = LIKELIHOOD.replace(timesteps_per_image=100)  # all 1,000: ten times the minutes
ANCESTRAL_250 = DiffusionSampling(sampler="ddpm", num_inference_steps=250)
Trained = TypeVar("Trained", bound=AnyTraining)


class System(NamedTuple):
    """A row of the comparison."""

    branch: str  # of the lecture's taxonomy: how well the density is known of what is sampled first, pixels or codes
    title: str


TRACTABLE, APPROXIMATE, IMPLICIT = "explicit, tractable", "explicit, approximate", "implicit"


def pixelcnn_32() -> OneModelRecipe:
    """Gated PixelCNN over the sub-pixels of 32² images, exact bits/dim."""
    return lone("pixelcnn_32", pixelwise(PIXELCNN_STEPS), likelihood=LIKELIHOOD)


def row_lstm_32() -> OneModelRecipe:
    """Row LSTM over the sub-pixels of 32² images, exact bits/dim."""
    model = pixelwise(ROW_LSTM_STEPS).replace(network="row_lstm", num_layers=4, kernel_size=3)
    return lone("row_lstm_32", model, likelihood=LIKELIHOOD)


def vae_32() -> OneModelRecipe:
    """VAE, Gaussian latents of 4² x 16, its bound in bits/dim."""
    model = timed(vae().model, VAE_STEPS)
    assert isinstance(model, AutoencoderTraining)
    return lone("vae_32", model.replace(kl_warmup_steps=model.optimization.total_steps // 4), likelihood=LIKELIHOOD)


def vqvae_pixelcnn_32() -> TokenBranchRecipe:
    """VQ-VAE by squared error, 8² tokens of 128 codes, and a PixelCNN over them."""
    prior = pixels().replace(resolution=None, conditions=())
    return tokens_of("vqvae_pixelcnn_32", tokenizer(), timed(prior, GRID_PIXELCNN_STEPS, share=0.5), TokenSampling())


def vqgan_transformer_32() -> TokenBranchRecipe:
    """VQ-GAN, 8² tokens of 128 codes, and a transformer over them."""
    prior = transformer().replace(conditions=(), positions="rotary_2d", token_corruption=0.1)
    return tokens_of("vqgan_transformer_32", vqgan(), timed(prior, TRANSFORMER_STEPS, share=0.5), TokenSampling())


def maskgit_32() -> TokenBranchRecipe:
    """MaskGIT over the tokens of the same VQ-GAN, 12 steps in place of 64."""
    prior = timed(masked_transformer().replace(conditions=()), TRANSFORMER_STEPS, share=0.5)
    return tokens_of("maskgit_32", vqgan(), prior, MaskedTokenSampling(num_inference_steps=12))


def gan_32() -> OneModelRecipe:
    """Residual GAN, spectral norm, hinge loss."""
    return lone("gan_32", timed(gan().model.replace(conditions=()), GAN_STEPS))


def ddpm_32() -> DiffusionStudiesRecipe:
    """DDPM, linear schedule, noise prediction, L_simple; 250 ancestral steps; its bound in bits/dim."""
    return bounded("ddpm_32", noise_net(), ANCESTRAL_250)


def ddpm_15_steps_32() -> DiffusionStudiesRecipe:
    """The same DDPM in 15 steps of SDE-DPM-Solver++(2M)."""
    return bounded("ddpm_15_steps_32", noise_net(), SKETCH)


def hybrid_32() -> DiffusionStudiesRecipe:
    """Improved DDPM, cosine schedule, learned variance, hybrid loss; 250 ancestral steps; its bound in bits/dim."""
    base = noise_net().replace(schedule="cosine", variance="learned_range", loss="hybrid")
    return bounded("hybrid_32", base, ANCESTRAL_250)


def latent_diffusion_32() -> DiffusionBranchRecipe:
    """Latent diffusion in the 8² x 4 latents of a VAE-GAN, 15 ancestral steps."""
    encoder = vqgan().replace(bottleneck="gaussian", latent_channels=4, kl_weight=1e-6)
    base = diffusion().replace(
        resolution=8, in_channels=4, conditions=(), channel_mult=(1, 2), attention_resolutions=(8, 4)
    )
    return branch(
        "latent_diffusion_32",
        timed(base, LATENT_DIFFUSION_STEPS, share=0.5),
        DiffusionBranchSampling(base=ANCESTRAL.replace(threshold="none")),
        autoencoder=encoder,
        precompute=PrecomputeConfig(columns=("latents",), resolution=SIDE, kept_resolution=8),
    )


def cascade_32() -> DiffusionBranchRecipe:
    """A base at 16² and an upsampler to 32², 15 and 8 steps of SDE-DPM-Solver++(2M), the 8 from the base's image."""
    enlarging = SKETCH.replace(num_inference_steps=14, strength=0.57, noise_level=50)
    upsampler = at_32(sketching()).replace(low_res_resolution=16, max_noise_level=300, conditions=())
    return branch(
        "cascade_32",
        timed(sketching().replace(conditions=()), DIFFUSION_16_STEPS, share=0.6),
        DiffusionBranchSampling(base=SKETCH, upsamplers=(enlarging,)),
        upsamplers=(timed(upsampler, DIFFUSION_32_STEPS, share=0.4),),
    )


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

# Steps in a minute of two cores of a Xeon without bf16, in fp32: four fifths of twice those of one core.
PIXELCNN_STEPS = 150
ROW_LSTM_STEPS = 390
VAE_STEPS = 370
TOKENIZER_STEPS = 340
VQGAN_STEPS = 430
GRID_PIXELCNN_STEPS = 740
TRANSFORMER_STEPS = 210
GAN_STEPS = 320
DIFFUSION_16_STEPS = 290
DIFFUSION_32_STEPS = 170
LATENT_DIFFUSION_STEPS = 860


def timed(training: Trained, steps_per_minute: int, *, share: float = 1.0) -> Trained:
    """The training with as many steps as fit into its share of MINUTES; one preview, at the end.

    All in fp32: not every processor has bf16, and not all networks gain the same by it.
    """
    steps = max(60, round(MINUTES * share * steps_per_minute))
    return training.replace(total_steps=steps, checkpoint_every=-(-steps // 4), sample_every=steps, precision="fp32")


def lone(name: str, model: Any, **parts: Any) -> OneModelRecipe:
    """A recipe of one model."""
    return OneModelRecipe(name=name, images=IMAGES, model=model, samples=SAMPLES, evaluation=EVALUATION, **parts)


def tokens_of(
    name: str,
    tokenizer: AutoencoderTraining,
    prior: PriorTraining | MaskedPriorTraining | PixelTraining,
    sampling: TokenSampling,
) -> TokenBranchRecipe:
    """A recipe of a tokenizer and a prior."""
    return TokenBranchRecipe(
        name=name,
        images=IMAGES,
        tokenizer=tokenizer,
        prior=prior,
        sampling=TokenBranchSampling(prior=sampling),
        samples=SAMPLES,
        evaluation=EVALUATION,
    )


def bounded(name: str, base: DiffusionTraining, sampling: DiffusionSampling) -> DiffusionStudiesRecipe:
    """A recipe of a diffusion model of pixels with its bound."""
    return DiffusionStudiesRecipe(
        name=name,
        images=IMAGES,
        base=base,
        sampling=DiffusionBranchSampling(base=sampling),
        samples=SAMPLES,
        likelihood=BOUND,
        evaluation=EVALUATION,
    )


def branch(
    name: str, base: DiffusionTraining, sampling: DiffusionBranchSampling, **parts: Any
) -> DiffusionBranchRecipe:
    """A recipe of a diffusion model with others before or after it."""
    return DiffusionBranchRecipe(
        name=name, images=IMAGES, base=base, sampling=sampling, samples=SAMPLES, evaluation=EVALUATION, **parts
    )


def pixelwise(steps_per_minute: int) -> PixelTraining:
    """A PixelCNN of 32² images."""
    return timed(pixels().replace(resolution=SIDE, conditions=(), channels=36, global_batch_size=8), steps_per_minute)


def tokenizer() -> AutoencoderTraining:
    """32² pixels to 8² tokens of 128 codes, by squared error, in half of the minutes."""
    return timed(scene_tokenizer(), TOKENIZER_STEPS, share=0.5)


def vqgan() -> AutoencoderTraining:
    """The same with a perceptual loss and a discriminator."""
    steps = timed(scene_tokenizer(), VQGAN_STEPS, share=0.5)
    return steps.replace(
        perceptual_network="efficientnet_lite1",
        perceptual_weight=0.1,
        adversarial_weight=0.4,
        discriminator_channels=16,
        discriminator_layers=2,
        discriminator_start=steps.optimization.total_steps // 2,
        global_batch_size=8,
    )


def noise_net() -> DiffusionTraining:
    """DDPM's model of 32² images, as its likelihood was measured."""
    base = at_32(diffusion()).replace(
        conditions=(), schedule="linear", prediction_type="epsilon", min_snr_gamma=None, variance="fixed_large"
    )
    return timed(base, DIFFUSION_32_STEPS)
