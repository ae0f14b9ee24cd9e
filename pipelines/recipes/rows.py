"""Rows of the lecture before diffusion: a recipe for each system, minutes on two cores.

Rows share what has equal numbers: the images, and the VQ-GAN that three priors are trained on.
"""

from components.configuration.networks import EMACodesConfig, GradientCodesConfig, ScalarCodesConfig
from components.configuration.sampling import (
    GANSampling,
    MaskedTokenSampling,
    OneModelSampling,
    RerankerSampling,
    TokenSampling,
)
from components.configuration.trainings import AutoencoderTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes import systems
from pipelines.recipes.shapes import ConditionRecipe, OneModelRecipe, SharedParts, TokenBranchRecipe

SAMPLES = SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=6, images_per_prompt=4)
EVALUATION = EvaluationConfig(reference_samples=1024)
EMOJI = SharedParts(systems.emoji(), SAMPLES, EVALUATION)
EMOJI_128, SCENES = EMOJI._replace(images=systems.emoji(128)), EMOJI._replace(images=systems.scenes())
GUIDED, UNGUIDED = TokenSampling(guidance_scale=1.5, top_k=100), TokenSampling(top_k=100)


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
