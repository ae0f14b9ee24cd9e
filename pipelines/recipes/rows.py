"""Rows of the lecture before diffusion, minutes each, and the taxonomy at a common size.

Rows share what has equal numbers: the images, and the VQ-GAN that three priors are trained on.

The systems of the taxonomy, TAXONOMY, learn the same images of 32². All train for the same minutes of two cores and are
conditioned on nothing; `cascade compare` runs them and sets them side by side. Steps are estimates for an idle machine;
the comparison prints the seconds that trainings took.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from components.configuration.networks import EMACodesConfig, GradientCodesConfig, ScalarCodesConfig
from components.configuration.sampling import (
    DiffusionBranchSampling,
    GANSampling,
    MaskedTokenSampling,
    OneModelSampling,
    RerankerSampling,
    TokenSampling,
)
from components.configuration.trainings import AutoencoderTraining
from components.evaluation.likelihood_study import LikelihoodConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes import systems
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe
from pipelines.recipes.shapes import ConditionRecipe, OneModelRecipe, SharedParts, TokenBranchRecipe

SAMPLES = SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=6, images_per_prompt=4)
EVALUATION = EvaluationConfig(reference_samples=1024)
EMOJI = SharedParts(systems.emoji(), SAMPLES, EVALUATION)
EMOJI_128, SCENES = EMOJI._replace(images=systems.emoji(128)), EMOJI._replace(images=systems.scenes())
GUIDED, UNGUIDED = TokenSampling(guidance_scale=1.5, top_k=100), TokenSampling(top_k=100)

MINUTES = 3.0  # of two cores, for all trainings of a system together: the one knob
SIDE = 32  # pixels
# Distances are to all training images.
SMALL = SharedParts(
    systems.emoji(SIDE), SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=0), EvaluationConfig()
)
LIKELIHOOD = LikelihoodConfig(samples=256)
BOUND = LIKELIHOOD.replace(timesteps_per_image=100)  # all 1,000: ten times the minutes


def vae() -> OneModelRecipe:
    """T1: VAE at 32², Gaussian latents of 4² x 16, its bound in bits/dim."""
    return EMOJI.one_model("vae", systems.vae())


def vae_gan() -> OneModelRecipe:
    """T1: VAE-GAN, 64² pixels to Gaussian latents of 16² x 4, perceptual and adversarial loss."""
    # Its latents are far from normal: D13 learns their distribution, and what is drawn from the normal is noise.
    return EMOJI.one_model("vae_gan", systems.vae_gan()).replace(samples=None)


def vqvae() -> OneModelRecipe:
    """T2: VQ-VAE as on the slides, 128² pixels to 32² latents of 512 codes that follow the slide's loss."""
    return EMOJI_128.one_model("vqvae", slide_vqvae())


def vqvae_ema() -> OneModelRecipe:
    """T2: the same with today's remedies: codes of length 1 that follow averages, and a patch shortcut."""
    codes = EMACodesConfig(codebook_size=512, codebook_dim=16, codebook_decay=0.97)
    return EMOJI_128.one_model("vqvae_ema", lecture_vqvae(codes))


def vqgan() -> OneModelRecipe:
    """T3: VQ-GAN, 64² pixels to 8² tokens of 512 codes, perceptual loss and patch discriminator."""
    return EMOJI.one_model("vqgan", systems.vqgan())


def dvae() -> OneModelRecipe:
    """T4: DALL-E's dVAE, Gumbel-softmax over 512 codes, logit-Laplace likelihood, 64² pixels to 8² tokens."""
    return EMOJI.one_model("dvae", systems.dvae())


def fsq() -> OneModelRecipe:
    """T5: finite scalar quantization, 8 x 8 x 8 levels, 64² pixels to 8² tokens."""
    return EMOJI.one_model("fsq", systems.autoencoder().replace(bottleneck=ScalarCodesConfig(levels=(8, 8, 8))))


def pixelcnn() -> OneModelRecipe:
    """P1: gated PixelCNN over the sub-pixels of 16² images by class, exact bits/dim."""
    return EMOJI.one_model("pixelcnn", systems.pixelcnn())


def pixelrnn() -> OneModelRecipe:
    """P1: Row LSTM over the sub-pixels of 16² images by class, exact bits/dim."""
    return EMOJI.one_model("pixelrnn", systems.as_row_lstm(systems.pixelcnn()).replace(total_steps=800))


def vqvae_pixelcnn() -> TokenBranchRecipe:
    """P2: PixelCNN by class over the index grid of the slide's VQ-VAE, 32² codes."""
    prior = systems.pixelcnn().replace(resolution=None, global_batch_size=8, total_steps=200, sample_every=100)
    return EMOJI_128.token_branch("vqvae_pixelcnn", slide_vqvae(), prior, TokenSampling())


def vqgan_transformer() -> TokenBranchRecipe:
    """P3: transformer by class over the tokens of the VQ-GAN; guidance, top-k; windows for larger images."""
    prior = systems.transformer().replace(positions="rotary_2d", token_corruption=0.1)
    return EMOJI.token_branch("vqgan_transformer", systems.vqgan(), prior, GUIDED)


def vqgan_transformer_unconditional() -> TokenBranchRecipe:
    """P3: the same transformer without any condition, over the same tokens."""
    prior = vqgan_transformer().prior.replace(conditions=(), cond_drop_prob=0.0)
    return EMOJI.token_branch("vqgan_transformer_unconditional", systems.vqgan(), prior, UNGUIDED)


def dalle() -> TokenBranchRecipe:
    """P4: DALL-E, a transformer of captions and the dVAE's tokens; an encoder keeps the best of four."""
    prior = systems.transformer().replace(conditions=("text",), text_loss_weight=1 / 8)
    recipe = EMOJI.token_branch("dalle", systems.dvae(), prior, GUIDED)
    sampling = recipe.sampling.replace(reranker=RerankerSampling(candidates=4))
    return recipe.replace(reranker=systems.contrastive(), sampling=sampling)


def depth_transformer() -> TokenBranchRecipe:
    """P5: from a depth map to an image; the map has a tokenizer of its own."""
    return conditioned("depth_transformer", systems.autoencoder_32().replace(member="depth", codebook_size=64))


def image_transformer() -> TokenBranchRecipe:
    """P5: from an image of 16² to one of 32²; the small one has a tokenizer of its own."""
    return conditioned("image_transformer", systems.autoencoder_32().replace(resolution=16))


def maskgit() -> TokenBranchRecipe:
    """P6: MaskGIT over the tokens of the VQ-GAN by class, 12 steps in place of 64."""
    sampling = MaskedTokenSampling(guidance_scale=1.5, top_k=100, num_inference_steps=12)
    return EMOJI.token_branch("maskgit", systems.vqgan(), systems.masked_transformer(), sampling)


def gan() -> OneModelRecipe:
    """G1: residual GAN by class at 32², projection discriminator, spectral norm, hinge loss."""
    return EMOJI.one_model("gan", systems.gan(), sampling=OneModelSampling(model=GANSampling()))


DISCRETE_ROWS = (
    *(vae, vae_gan, vqvae, vqvae_ema, vqgan, dvae, fsq, pixelcnn, pixelrnn, vqvae_pixelcnn, vqgan_transformer),
    *(vqgan_transformer_unconditional, dalle, depth_transformer, image_transformer, maskgit, gan),
)


def lecture_vqvae(bottleneck: EMACodesConfig | GradientCodesConfig) -> AutoencoderTraining:
    """128² pixels to 32² latents, K = 512 (van den Oord et al., 2017, section 4.2), by squared error."""
    return systems.autoencoder().replace(
        resolution=128, channel_mult=(1, 2, 2), bottleneck=bottleneck, total_steps=250, sample_every=125
    )


def slide_vqvae() -> AutoencoderTraining:
    """The slide's loss alone; codes start as latents, since of equal codes few are ever used."""
    codes = GradientCodesConfig(codebook_size=512, codebook_dim=16, codebook_init="data", l2_normalize=False)
    return lecture_vqvae(codes).replace(patch_shortcut=False)


def conditioned(name: str, tokenizer: AutoencoderTraining) -> TokenBranchRecipe:
    """A recipe of a prior over scenes after the tokens of another image of the same scene."""
    other = tokenizer.replace(total_steps=200)
    condition = ConditionRecipe(tokenizer=other, tokens=TokensConfig(member=other.data.member))
    prior = systems.transformer().replace(conditions=("condition",), global_batch_size=16)
    return SCENES.token_branch(name, systems.autoencoder_32(), prior, UNGUIDED, condition=condition)


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
    return SMALL.token_branch("vqgan_transformer_32", half_vqgan(), prior, TokenSampling())


def maskgit_32() -> TokenBranchRecipe:
    """MaskGIT over the tokens of the same VQ-GAN, 12 steps in place of 64."""
    prior = timed(systems.masked_transformer().replace(conditions=()), 210, share=0.5)
    return SMALL.token_branch("maskgit_32", half_vqgan(), prior, MaskedTokenSampling(num_inference_steps=12))


def gan_32() -> OneModelRecipe:
    """Residual GAN, spectral norm, hinge loss."""
    return SMALL.one_model("gan_32", timed(systems.gan().replace(conditions=()), 320))


def ddpm_32() -> DiffusionStudiesRecipe:
    """DDPM, linear schedule, noise prediction, L_simple; 250 ancestral steps; its bound in bits/dim."""
    base = timed(systems.as_ddpm(systems.diffusion(32)), 170)
    return SMALL.studies("ddpm_32", base, systems.ANCESTRAL_250, likelihood=BOUND)


def ddpm_15_steps_32() -> DiffusionStudiesRecipe:
    """The same DDPM in 15 steps of SDE-DPM-Solver++(2M)."""
    return SMALL.studies("ddpm_15_steps_32", ddpm_32().base, systems.SKETCH, likelihood=BOUND)


def hybrid_32() -> DiffusionStudiesRecipe:
    """Improved DDPM, cosine schedule, learned variance, hybrid loss; 250 steps; its bound in bits/dim."""
    base = timed(systems.as_improved_ddpm(systems.diffusion(32)), 170)
    return SMALL.studies("hybrid_32", base, systems.ANCESTRAL_250, likelihood=BOUND)


def latent_diffusion_32() -> DiffusionBranchRecipe:
    """Latent diffusion in the 8² x 4 latents of a VAE-GAN, 15 ancestral steps."""
    encoder = half_vqgan().replace(bottleneck="gaussian", latent_channels=4, kl_weight=1e-6)
    base = systems.diffusion().replace(resolution=8, in_channels=4, channel_mult=(1, 2), conditions=())
    base = timed(base, 860, share=0.5)
    once = PrecomputeConfig(columns=("latents",), resolution=SIDE, kept_resolution=8)
    sampling = systems.ANCESTRAL.replace(threshold="none")
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


def half_vqgan() -> AutoencoderTraining:
    """VQ-GAN of 32² pixels and 8² tokens of 128 codes, in half of the minutes."""
    training = timed(systems.autoencoder_32(), 430, share=0.5)
    start = training.optimization.total_steps // 2
    return systems.adversarial(training, start=start).replace(global_batch_size=8)
