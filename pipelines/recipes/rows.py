"""Rows of the lecture before diffusion, minutes each, and the taxonomy at a common size.

The systems of the taxonomy, TAXONOMY, learn the same images of 32², conditioned on nothing, for MINUTES of one core.
`cascade compare` trains them anew for each budget, so that learning rates have fallen where a model is measured, and
sets them side by side. Steps a minute are by `cpu_seconds` of one thread in fp32 on a Xeon with AVX-512."""

from dataclasses import dataclass

from components.configuration.diffusion import DiffusionTraining
from components.configuration.networks import EMACodesConfig, GradientCodesConfig, ScalarCodesConfig
from components.configuration.optimization import Training
from components.configuration.sampling import (
    DiffusionBranchSampling,
    GANSampling,
    MaskedTokenSampling,
    OneModelSampling,
    RerankerSampling,
    TokenBranchSampling,
    TokenSampling,
)
from components.configuration.trainings import AutoencoderTraining, PriorTraining
from components.evaluation.codes_study import CodesStudyConfig
from components.evaluation.likelihood_study import LikelihoodConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes import systems
from pipelines.recipes.diffusion_shapes import ObedienceRecipe
from pipelines.recipes.shapes import ConditionRecipe, RecipeRow, SharedParts, TokenBranchRecipe

SAMPLES = SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=6, images_per_prompt=4)
EVALUATION = EvaluationConfig(reference_samples=1024)
EMOJI = SharedParts(systems.emoji(), SAMPLES, EVALUATION)
EMOJI_128, SCENES = EMOJI._replace(images=systems.emoji(128)), EMOJI._replace(images=systems.scenes())
# Learned in minutes well enough to be recognized. Each word thousands of times, four colors never with a certain shape.
DESCRIBED = EMOJI._replace(
    images=systems.scenes().replace(limit=8000, samples_per_shard=500, vocab_size=512, text_length=12, held_out_pairs=4)
)
DEMO = systems.described()
DEMO_IMAGES = EMOJI._replace(images=DEMO.images)  # the same scenes at 64²
GUIDED, UNGUIDED = TokenSampling(guidance_scale=1.5, top_k=100), TokenSampling(top_k=100)
ROTARY = {"positions": "rotary_2d", "token_corruption": 0.1}  # of transformers over the tokens of a VQ-GAN

MINUTES, SIDE = 2, 32  # of one core for a system; pixels
BUDGETS, LONGEST = (2, 8), 32  # minutes that all systems are measured at, and the principal ones
# Distances are to all training images.
SMALL = SharedParts(
    systems.emoji(SIDE), SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=0), EvaluationConfig()
)
LIKELIHOOD, BY_ADAMW = LikelihoodConfig(samples=256), {"optimizer": "adamw", "learning_rate": 2e-3}
PIXELS = {"resolution": SIDE, "conditions": (), "channels": 36, "global_batch_size": 8, **BY_ADAMW}
BOUND = LIKELIHOOD.replace(timesteps_per_image=25)  # all 1,000: hours


def by_class(name: str, prior: Training, sampling: TokenSampling) -> TokenBranchRecipe:
    """A prior over the demo's tokens of scenes of 64², which are made once."""
    return DEMO_IMAGES.token_branch(name, DEMO.tokenizer, prior, sampling)


def lecture_vqvae(bottleneck: EMACodesConfig | GradientCodesConfig) -> AutoencoderTraining:
    """128² pixels to 32² latents, K = 512 (van den Oord et al., 2017, section 4.2), by squared error."""
    return systems.autoencoder().replace(
        resolution=128, channel_mult=(1, 2, 2), bottleneck=bottleneck, total_steps=250, sample_every=125
    )


def slide_vqvae() -> AutoencoderTraining:
    """The slide's loss alone; codes start as latents, since of equal codes few are ever used."""
    codes = GradientCodesConfig(codebook_size=512, codebook_dim=16, codebook_init="data", l2_normalize=False)
    return lecture_vqvae(codes).replace(patch_shortcut=False)


def token_transformer() -> PriorTraining:
    """Transformer by class over the tokens of a VQ-GAN."""
    return systems.transformer().replace(optimizer="muon", **systems.optimized(1000, 32, 6e-3), **ROTARY)


def conditioned(name: str, tokenizer: AutoencoderTraining) -> TokenBranchRecipe:
    """A prior over scenes after the tokens of another image of the same scene."""
    fit = {"optimizer": "muon", **systems.optimized(600, 16, 1e-3, saves=2)}
    own, seen = systems.autoencoder_32().replace(**fit), tokenizer.replace(**fit)
    condition = ConditionRecipe(tokenizer=seen, tokens=TokensConfig(member=seen.data.member))
    grid = {"positions": "learned_2d", "token_corruption": 0.3, "global_batch_size": 16}
    prior = token_transformer().replace(conditions=("condition",), **grid)
    return SCENES.token_branch(name, own, prior, UNGUIDED, condition=condition)


# fmt: off
DISCRETE_ROWS = (
    # Of a grid of latents a sample has blobs without a scene: what lies beside what is not in its prior.
    RecipeRow("vae", "T1: VAE of scenes of 32², one Gaussian latent vector of 32, its bound in bits/dim.",
        lambda name: DESCRIBED.one_model(name, systems.vae().replace(
            channels=16, channel_mult=(1, 2, 4, 4, 4, 4), latent_channels=32, learning_rate=2e-3, norm_groups=1,
            shared_scale=True, total_steps=4800, kl_warmup_steps=3600, sample_every=1200))),
    # Its latents are far from normal: D13 learns their distribution, and what is drawn from the normal is noise.
    RecipeRow("vae_gan", "T1: VAE-GAN, scenes of 64² to Gaussian latents of 16² x 4, perceptual and adversarial loss.",
        lambda name: DEMO_IMAGES.one_model(name, systems.vae_gan(), samples=None)),
    RecipeRow("vqvae",
        "T2: VQ-VAE as on the slides, 128² pixels to 32² latents of 512 codes that follow the slide's loss.",
        lambda name: EMOJI_128.one_model(name, slide_vqvae(), codes_study=CodesStudyConfig())),
    RecipeRow("vqvae_ema",
        "T2: the same with today's remedies: codes of length 1 that follow averages, and a patch shortcut.",
        lambda name: EMOJI_128.one_model(
            name, lecture_vqvae(EMACodesConfig(codebook_size=512, codebook_dim=16, codebook_decay=0.97)))),
    RecipeRow("vqgan", "T3: VQ-GAN, 64² pixels to 8² tokens of 512 codes, perceptual loss and patch discriminator.",
        lambda name: EMOJI.one_model(
            name, systems.adversarial(systems.autoencoder(), start=200).replace(total_steps=450))),
    RecipeRow("dvae",
        "T4: DALL-E's dVAE, Gumbel-softmax over 512 codes, logit-Laplace likelihood, 64² pixels to 8² tokens.",
        lambda name: EMOJI.one_model(name, systems.dvae())),
    RecipeRow("fsq", "T5: finite scalar quantization, 8 x 8 x 8 levels, 64² pixels to 8² tokens.",
        lambda name: EMOJI.one_model(
            name, systems.autoencoder().replace(bottleneck=ScalarCodesConfig(levels=(8, 8, 8))))),
    RecipeRow("pixelcnn", "P1: gated PixelCNN over the sub-pixels of scenes of 16² by class, exact bits/dim.",
        lambda name: DESCRIBED.one_model(name, systems.pixelcnn().replace(total_steps=1800))),
    RecipeRow("pixelrnn", "P1: Row LSTM over the sub-pixels of scenes of 16² by class, exact bits/dim.",
        lambda name: DESCRIBED.one_model(name, systems.as_row_lstm(systems.pixelcnn()).replace(total_steps=3200))),
    RecipeRow("vqvae_pixelcnn",
        "P2: PixelCNN by class over the index grid of the slide's VQ-VAE, scenes of 32², 8² codes.",
        lambda name: DESCRIBED.token_branch(
            name, slide_vqvae().replace(
                resolution=32, channels=32, total_steps=600, global_batch_size=16, sample_every=300),
            systems.pixelcnn().replace(resolution=None, total_steps=1500, sample_every=750), TokenSampling())),
    RecipeRow("vqgan_transformer",
        "P3: transformer by class over the demo's VQ-GAN tokens; guidance, top-k; windows for larger images.",
        lambda name: by_class(name, token_transformer(), GUIDED)),
    RecipeRow("vqgan_transformer_unconditional",
        "P3: the same transformer without any condition, over the same tokens.",
        lambda name: by_class(name, token_transformer().replace(conditions=(), cond_drop_prob=0.0), UNGUIDED)),
    # Over the tokens of a VQ-GAN, as minDALL-E's: over T4's, as DALL-E's, 58 % of unseen pairs are right, not 99.
    RecipeRow("dalle",
        "P4: DALL-E's transformer of captions and the demo's tokens; an encoder keeps the best of four.",
        lambda name: DEMO_IMAGES.token_branch(
            name, DEMO.tokenizer, DEMO.prior,
            TokenBranchSampling(prior=GUIDED, reranker=RerankerSampling(candidates=4)),
            reranker=systems.contrastive(), obedience=ObedienceRecipe())),
    RecipeRow("depth_transformer", "P5: from a depth map to an image; the map has a tokenizer of its own.",
        lambda name: conditioned(name, systems.autoencoder_32().replace(member="depth", codebook_size=64))),
    RecipeRow("image_transformer", "P5: from an image of 16² to one of 32²; the small one has a tokenizer of its own.",
        lambda name: conditioned(name, systems.autoencoder_32().replace(resolution=16))),
    RecipeRow("maskgit", "P6: MaskGIT over the same tokens by class, 12 steps in place of 64.",
        lambda name: by_class(
            name,
            systems.masked_transformer().replace(optimizer="muon", **systems.optimized(1600, 32, 6e-3)),
            MaskedTokenSampling(guidance_scale=1.5, top_k=100, num_inference_steps=12))),
    RecipeRow("gan",
        "G1: residual GAN of scenes of 32² by class, projection discriminator, spectral norm, hinge loss.",
        lambda name: DESCRIBED.one_model(name, systems.gan(), sampling=OneModelSampling(model=GANSampling()))),
)


@dataclass(frozen=True)
class System(RecipeRow):
    """A row of the comparison."""

    title: str
    branch: str  # of the lecture's taxonomy: how well the density is known of what is sampled first, pixels or codes
    principal: bool = False  # measured at LONGEST too, and on scenes


TRACTABLE, APPROXIMATE, IMPLICIT = "explicit, tractable", "explicit, approximate", "implicit"
TAXONOMY = (
    System("pixelcnn_32", "Gated PixelCNN over the sub-pixels of 32² images, exact bits/dim.",
        lambda name: SMALL.one_model(name, timed(systems.pixelcnn().replace(**PIXELS), 160), likelihood=LIKELIHOOD),
        "PixelCNN", TRACTABLE),
    System("row_lstm_32", "Row LSTM over the sub-pixels of 32² images, exact bits/dim.",
        lambda name: SMALL.one_model(name, timed(
            systems.as_row_lstm(systems.pixelcnn()).replace(**PIXELS), 350), likelihood=LIKELIHOOD),
        "Row LSTM", TRACTABLE),
    System("vae_32", "VAE, Gaussian latents of 4² x 16, its bound in bits/dim.",
        lambda name: SMALL.one_model(name, timed_vae(), likelihood=LIKELIHOOD),
        "VAE", APPROXIMATE),
    System("vqvae_pixelcnn_32", "VQ-VAE by squared error, 8² tokens of 128 codes, and a PixelCNN over them.",
        lambda name: SMALL.token_branch(
            name, timed(systems.autoencoder_32(), 299, share=0.5),
            timed(systems.pixelcnn().replace(resolution=None, conditions=(), **BY_ADAMW), 774, share=0.5),
            TokenSampling()),
        "VQ-VAE + PixelCNN", APPROXIMATE),
    System("vqgan_transformer_32", "VQ-GAN, 8² tokens of 128 codes, and a transformer over them.",
        lambda name: SMALL.token_branch(
            name, half_vqgan(), timed(systems.transformer().replace(conditions=(), **ROTARY), 222, share=0.5),
            TokenSampling()),
        "VQ-GAN + transformer", APPROXIMATE, principal=True),
    System("maskgit_32", "MaskGIT over the tokens of the same VQ-GAN, 12 steps in place of 64.",
        lambda name: SMALL.token_branch(
            name, half_vqgan(), timed(systems.masked_transformer().replace(conditions=()), 238, share=0.5),
            MaskedTokenSampling(num_inference_steps=12)),
        "MaskGIT", APPROXIMATE),
    System("ddpm_32", "DDPM, linear schedule, noise prediction, L_simple; 250 ancestral steps; its bound in bits/dim.",
        lambda name: SMALL.studies(name, timed_ddpm(), systems.ANCESTRAL_250, likelihood=BOUND),
        "DDPM, 250 steps", APPROXIMATE, principal=True),
    System("ddpm_15_steps_32", "The same DDPM in 15 steps of SDE-DPM-Solver++(2M).",
        lambda name: SMALL.studies(name, timed_ddpm(), systems.SKETCH, likelihood=BOUND),
        "DDPM, 15 steps", APPROXIMATE),
    System("today_32",
        "What the field does now: x_0 predicted, min-SNR weights, cosine schedule; 15 steps of SDE-DPM-Solver++(2M).",
        lambda name: SMALL.studies(
            name, timed(systems.sketching(32).replace(conditions=()), 177), systems.SKETCH, likelihood=BOUND),
        "diffusion of today, 15 steps", APPROXIMATE, principal=True),
    System("hybrid_32",
        "Improved DDPM, cosine schedule, learned variance, hybrid loss; 250 steps; its bound in bits/dim.",
        lambda name: SMALL.studies(
            name, timed(systems.as_improved_ddpm(systems.diffusion(32)), 174), systems.ANCESTRAL_250, likelihood=BOUND),
        "DDPM, hybrid loss", APPROXIMATE),
    System("latent_diffusion_32", "Latent diffusion in the 8² x 4 latents of a VAE-GAN, 15 ancestral steps.",
        lambda name: SMALL.branch(
            name, timed(systems.diffusion().replace(
                resolution=8, in_channels=4, channel_mult=(1, 2), conditions=()), 900, share=0.5),
            systems.ANCESTRAL.replace(threshold="none"),
            autoencoder=half_vqgan().replace(bottleneck="gaussian", latent_channels=4, kl_weight=1e-6),
            precompute=PrecomputeConfig(columns=("latents",), resolution=SIDE, kept_resolution=8)),
        "latent diffusion", APPROXIMATE, principal=True),
    System("cascade_32", "A base at 16² and an upsampler to 32², 15 and 8 steps of SDE-DPM-Solver++(2M).",
        lambda name: SMALL.branch(
            name, timed(systems.sketching().replace(conditions=()), 285, share=0.6),
            DiffusionBranchSampling(base=systems.SKETCH, upsamplers=(
                systems.SKETCH.replace(num_inference_steps=14, strength=0.57, noise_level=50),)),
            upsamplers=(timed(systems.sketching(32).replace(
                low_res_resolution=16, max_noise_level=300, conditions=()), 176, share=0.4),)),
        "cascade", APPROXIMATE),
    System("gan_32", "Residual GAN, spectral norm, hinge loss.",
        lambda name: SMALL.one_model(name, timed(systems.gan().replace(conditions=(), augment=True), 221)),
        "GAN", IMPLICIT, principal=True),
)
# fmt: on


def timed(training: systems.Trained, steps_per_minute: int, *, share: float = 1.0) -> systems.Trained:
    """The training with the steps of its share of MINUTES, and a preview at the end, in fp32.
    Not every processor has bf16, and not all networks gain the same by it."""
    steps = round(MINUTES * share * steps_per_minute)
    return training.replace(total_steps=steps, checkpoint_every=-(-steps // 4), sample_every=steps, precision="fp32")


def timed_vae() -> AutoencoderTraining:
    """VAE of 32² pixels in all of the minutes, a quarter of them with a divergence that gains weight."""
    training = timed(systems.vae(), 297)
    return training.replace(kl_warmup_steps=training.optimization.total_steps // 4)


def timed_ddpm() -> DiffusionTraining:
    """DDPM of 32² pixels, in all of the minutes."""
    return timed(systems.as_ddpm(systems.diffusion(32)), 177)


def half_vqgan() -> AutoencoderTraining:
    """VQ-GAN of 32² pixels and 8² tokens of 128 codes, in half of the minutes."""
    training = timed(systems.autoencoder_32(), 353, share=0.5)
    start = training.optimization.total_steps // 2
    return systems.adversarial(training, start=start).replace(global_batch_size=8)
