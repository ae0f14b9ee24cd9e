"""The rows of the lecture before diffusion: each system by its own recipe, minutes on two cores.

Rows share what has equal numbers: the images, and the VQ-GAN that three priors are trained on.
"""

from collections.abc import Callable

from components.configuration.networks import (
    EMACodesConfig,
    GradientCodesConfig,
    GumbelCodesConfig,
    ScalarCodesConfig,
)
from components.configuration.sampling import (
    GANSampling,
    MaskedTokenSampling,
    OneModelSampling,
    RerankerSampling,
    TokenBranchSampling,
    TokenSampling,
)
from components.configuration.trainings import (
    AutoencoderTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes.row_encoder import contrastive
from pipelines.recipes.shapes import ConditionRecipe, OneModelRecipe, TokenBranchRecipe

Row = OneModelRecipe | TokenBranchRecipe
SAMPLES = SamplesConfig(measured_samples=256, images_per_class=4, num_prompts=6, images_per_prompt=4)
EVALUATION = EvaluationConfig(reference_samples=1024)
GUIDED, UNGUIDED = TokenSampling(guidance_scale=1.5, top_k=100), TokenSampling(top_k=100)


def vae() -> OneModelRecipe:
    """T1: VAE at 32², Gaussian latents of 4² x 16, its bound in bits/dim."""
    model = autoencoder().replace(
        resolution=32,
        channels=32,
        channel_mult=(1, 2, 2, 2),
        latent_channels=16,
        bottleneck="gaussian",
        reconstruction="discretized_logistic",
        kl_warmup_steps=200,
        total_steps=700,
        global_batch_size=16,
        learning_rate=1e-3,
        betas=(0.9, 0.99),
    )
    return one_model("vae", model)


def vae_gan() -> OneModelRecipe:
    """T1: VAE-GAN, 64² pixels to Gaussian latents of 16² x 4; perceptual and adversarial loss; for latent diffusion."""
    # Its latents are far from normal: D13 learns their distribution, and what is drawn from the normal is noise.
    return one_model("vae_gan", vae_gan_autoencoder()).replace(samples=None)


def vqvae() -> OneModelRecipe:
    """T2: VQ-VAE as on the slides, 128² pixels to 32² latents of 512 codes that follow the slide's loss."""
    return one_model("vqvae", slide_vqvae(), images=emoji(resolution=128))


def vqvae_ema() -> OneModelRecipe:
    """T2: the same with today's remedies: codes of length 1 that follow averages, and a patch shortcut."""
    codes = EMACodesConfig(codebook_size=512, codebook_dim=16, codebook_decay=0.97)
    return one_model("vqvae_ema", lecture_vqvae(codes), images=emoji(resolution=128))


def vqgan() -> OneModelRecipe:
    """T3: VQ-GAN, 64² pixels to 8² tokens of 512 codes, perceptual loss and patch discriminator."""
    return one_model("vqgan", vqgan_tokenizer())


def dvae() -> OneModelRecipe:
    """T4: DALL-E's dVAE, Gumbel-softmax over 512 codes, logit-Laplace likelihood, 64² pixels to 8² tokens."""
    return one_model("dvae", dvae_tokenizer())


def fsq() -> OneModelRecipe:
    """T5: finite scalar quantization, 8 x 8 x 8 levels, 64² pixels to 8² tokens."""
    return one_model("fsq", autoencoder().replace(bottleneck=ScalarCodesConfig(levels=(8, 8, 8))))


def pixelcnn() -> OneModelRecipe:
    """P1: gated PixelCNN over the sub-pixels of 16² images by class, exact bits/dim."""
    return one_model("pixelcnn", pixels())


def pixelrnn() -> OneModelRecipe:
    """P1: Row LSTM over the sub-pixels of 16² images by class, exact bits/dim."""
    return one_model("pixelrnn", pixels().replace(network="row_lstm", num_layers=4, kernel_size=3, total_steps=800))


def vqvae_pixelcnn() -> TokenBranchRecipe:
    """P2: PixelCNN by class over the index grid of the slide's VQ-VAE, 32² codes."""
    prior = pixels().replace(resolution=None, global_batch_size=8, total_steps=200, sample_every=100)
    images = emoji(resolution=128)
    return token_branch("vqvae_pixelcnn", prior, TokenSampling(), tokenizer=slide_vqvae(), images=images)


def vqgan_transformer() -> TokenBranchRecipe:
    """P3: transformer by class over the tokens of the VQ-GAN; guidance, top-k; windows for larger images."""
    prior = transformer().replace(positions="rotary_2d", token_corruption=0.1)
    return token_branch("vqgan_transformer", prior, GUIDED)


def vqgan_transformer_unconditional() -> TokenBranchRecipe:
    """P3: the same transformer without any condition, over the same tokens."""
    prior = transformer().replace(positions="rotary_2d", token_corruption=0.1, conditions=(), cond_drop_prob=0.0)
    return token_branch("vqgan_transformer_unconditional", prior, UNGUIDED)


def dalle() -> TokenBranchRecipe:
    """P4: DALL-E, a transformer learns captions and the dVAE's tokens; a contrastive encoder keeps the best of four."""
    prior = transformer().replace(conditions=("text",), text_loss_weight=1 / 8)
    plain = token_branch("dalle", prior, GUIDED, tokenizer=dvae_tokenizer())
    sampling = plain.sampling.replace(reranker=RerankerSampling(candidates=4))
    return plain.replace(reranker=contrastive(), sampling=sampling)


def depth_transformer() -> TokenBranchRecipe:
    """P5: from a depth map to an image; the map has a tokenizer of its own."""
    seen = scene_tokenizer().replace(member="depth", codebook_size=64, total_steps=200)
    return conditioned("depth_transformer", seen)


def image_transformer() -> TokenBranchRecipe:
    """P5: from an image of 16² to one of 32²; the small one has a tokenizer of its own."""
    seen = scene_tokenizer().replace(resolution=16, total_steps=200)
    return conditioned("image_transformer", seen)


def maskgit() -> TokenBranchRecipe:
    """P6: MaskGIT over the tokens of the VQ-GAN by class, 12 steps in place of 64."""
    sampling = MaskedTokenSampling(**GUIDED.model_dump(), num_inference_steps=12)
    return token_branch("maskgit", masked_transformer(), sampling)


def gan() -> OneModelRecipe:
    """G1: residual GAN by class at 32², projection discriminator, spectral norm, hinge loss."""
    return one_model(
        "gan",
        GANTraining.of(
            resolution=32,
            channels=24,
            channel_mult=(1, 2, 4),
            noise_dim=64,
            discriminator_channels=24,
            discriminator_channel_mult=(1, 2, 4),
            augment=True,
            max_grad_norm=10.0,  # gradients of a hinge loss under spectral norm have norms of 3 to 5
            total_steps=700,
            global_batch_size=32,
            learning_rate=5e-4,
            discriminator_learning_rate=1e-3,
            ema_decay=0.99,
            checkpoint_every=200,
            sample_every=350,
        ),
    )


DISCRETE_ROWS: dict[Callable[[], Row], str] = {
    vae: "T1",
    vae_gan: "T1",
    vqvae: "T2",
    vqvae_ema: "T2",
    vqgan: "T3",
    dvae: "T4",
    fsq: "T5",
    pixelcnn: "P1",
    pixelrnn: "P1",
    vqvae_pixelcnn: "P2",
    vqgan_transformer: "P3",
    vqgan_transformer_unconditional: "P3",
    dalle: "P4",
    depth_transformer: "P5",
    image_transformer: "P5",
    maskgit: "P6",
    gan: "G1",
}


def one_model(
    name: str, model: AutoencoderTraining | PixelTraining | GANTraining, *, images: ImagesConfig | None = None
) -> OneModelRecipe:
    """A recipe of one model of the demo's images, or of other images."""
    sampling = OneModelSampling(model=GANSampling() if isinstance(model, GANTraining) else None)
    return OneModelRecipe(
        name=name, images=images or emoji(), model=model, sampling=sampling, samples=SAMPLES, evaluation=EVALUATION
    )


def token_branch(
    name: str,
    prior: PriorTraining | MaskedPriorTraining | PixelTraining,
    sampling: TokenSampling,
    *,
    tokenizer: AutoencoderTraining | None = None,
    images: ImagesConfig | None = None,
    condition: ConditionRecipe | None = None,
) -> TokenBranchRecipe:
    """A recipe of a prior over the VQ-GAN's tokens of the demo's images, or over others."""
    return TokenBranchRecipe(
        name=name,
        images=images or emoji(),
        tokenizer=tokenizer or vqgan_tokenizer(),
        condition=condition,
        prior=prior,
        sampling=TokenBranchSampling(prior=sampling),
        samples=SAMPLES,
        evaluation=EVALUATION,
    )


def conditioned(name: str, seen: AutoencoderTraining) -> TokenBranchRecipe:
    """A recipe of a prior over scenes after the tokens of another image of the same scene."""
    condition = ConditionRecipe(tokenizer=seen, tokens=TokensConfig(member=seen.data.member))
    prior = transformer().replace(conditions=("condition",), global_batch_size=16)
    return token_branch(name, prior, UNGUIDED, images=scenes(), tokenizer=scene_tokenizer(), condition=condition)


def emoji(resolution: int = 64) -> ImagesConfig:
    """The images of the demo: with equal numbers they are ingested once."""
    return ImagesConfig(
        source="openmoji",
        resolution=resolution,
        samples_per_shard=256,
        holdout_fraction=0.1,
        vocab_size=1024,
        text_length=16,
    )


def scenes() -> ImagesConfig:
    """Colored solids with exact depth maps."""
    return ImagesConfig(
        source="scenes",
        resolution=32,
        samples_per_shard=256,
        holdout_fraction=0.1,
        vocab_size=300,
        text_length=16,
        limit=3072,
    )


def autoencoder() -> AutoencoderTraining:
    """64² pixels to 8² tokens of 512 codes by mean squared difference alone."""
    return AutoencoderTraining.of(
        resolution=64,
        channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        latent_channels=64,
        patch_shortcut=True,
        bottleneck=EMACodesConfig(codebook_size=512, codebook_dim=8, codebook_decay=0.97),
        reconstruction="mse",  # a mean keeps more color than l1's median
        perceptual_network="none",
        perceptual_weight=0.0,
        adversarial_weight=0.0,
        total_steps=650,
        global_batch_size=8,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=325,
    )


def lecture_vqvae(bottleneck: EMACodesConfig | GradientCodesConfig) -> AutoencoderTraining:
    """128² pixels to 32² latents, K = 512 (van den Oord et al., 2017, section 4.2), by squared error."""
    return autoencoder().replace(
        resolution=128, channel_mult=(1, 2, 2), bottleneck=bottleneck, total_steps=250, sample_every=125
    )


def slide_vqvae() -> AutoencoderTraining:
    """The slide's loss and nothing else; codes start as latents, since of equal ones few are ever used."""
    codes = GradientCodesConfig(codebook_size=512, codebook_dim=16, codebook_init="data", l2_normalize=False)
    return lecture_vqvae(codes).replace(patch_shortcut=False)


def vqgan_tokenizer() -> AutoencoderTraining:
    """The demo's VQ-GAN with fewer steps."""
    return autoencoder().replace(
        perceptual_network="efficientnet_lite1",
        perceptual_weight=0.1,
        adversarial_weight=0.4,
        discriminator_channels=16,
        discriminator_layers=2,
        discriminator_start=200,
        total_steps=450,
    )


def vae_gan_autoencoder() -> AutoencoderTraining:
    """The first stage of latent diffusion: a divergence that only keeps the latents near the origin (Rombach et al.,
    2022, appendix G), so that the reconstruction decides what they hold."""
    return vqgan_tokenizer().replace(
        channel_mult=(1, 2, 4),
        latent_channels=4,
        bottleneck="gaussian",
        kl_weight=1e-6,
        discriminator_start=300,
        total_steps=650,
    )


def dvae_tokenizer() -> AutoencoderTraining:
    """Gumbel-softmax; the relaxation hardens while the weight of the divergence grows (Ramesh et al., 2021)."""
    return autoencoder().replace(
        bottleneck=GumbelCodesConfig(codebook_size=512, codebook_dim=64),
        patch_shortcut=False,  # with it 8 % of the codes are in use in place of 73 %
        reconstruction="logit_laplace",
        kl_weight=6.6,  # as published; after 150 steps 98 codes' worth are in use, and 51 with 1
        kl_warmup_steps=300,
        temperature_steps=600,
    )


def scene_tokenizer() -> AutoencoderTraining:
    """32² pixels to 8² tokens of 128 codes."""
    return autoencoder().replace(
        resolution=32,
        channels=32,
        channel_mult=(1, 2, 2),
        latent_channels=32,
        codebook_size=128,
        total_steps=300,
        global_batch_size=16,
        sample_every=150,
    )


def transformer() -> PriorTraining:
    """The demo's, by class."""
    return PriorTraining.of(
        model_dim=192,
        num_layers=4,
        num_heads=6,
        dropout=0.1,
        conditions=("label",),
        cond_drop_prob=0.1,
        total_steps=450,
        global_batch_size=32,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=150,
        sample_every=225,
    )


def masked_transformer() -> MaskedPriorTraining:
    """The same size, batch and steps."""
    plain = transformer()
    return MaskedPriorTraining.of(
        **plain.network.model_dump(exclude={"kind"}), conditioning=plain.conditioning, optimization=plain.optimization
    )


def pixels() -> PixelTraining:
    """A PixelCNN by class, of 16² images."""
    return PixelTraining.of(
        network="pixelcnn",
        resolution=16,
        channels=48,
        num_layers=7,
        dropout=0.1,
        conditions=("label",),
        total_steps=450,
        global_batch_size=16,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=225,
    )
