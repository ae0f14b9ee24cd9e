"""Published systems at full size, as recipes for the user's images and cluster.

cascade run --recipe imagenet_class_prior --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from typing import Any

from components.configuration import trainings
from components.configuration.optimization import Training
from components.configuration.sampling import (
    ClassifierSampling,
    DiffusionBranchSampling,
    DiffusionPriorSampling,
    DiffusionSampling,
    MaskedTokenSampling,
    RestorationSampling,
    TokenSampling,
    TransformerSampling,
)
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.restoration import RestorationConfig
from components.models.diffusion.steps import spaced_timesteps
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import Column, PrecomputeConfig, TextEncoderConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, ImageToImageRecipe
from pipelines.recipes.published_networks import AUTOENCODERS, LARGE, PAPER_CLASSIFIERS, PAPER_DIFFUSION, published
from pipelines.recipes.shapes import ConditionRecipe, RecipeRow, SharedParts, TokenBranchRecipe

ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=250)  # of IDDPM, ADM, GLIDE
ANCESTRAL_1000 = DiffusionSampling(sampler="ddpm", num_inference_steps=1000)  # of DDPM, Palette


# fmt: off
LATENT = DiffusionSampling(  # of LDM
    sampler="ddim", num_inference_steps=200, spacing="leading_from_1", threshold="none")
# "fast27" of openai/glide-text2im: sections, and in place of step 999 the one two before.
FAST_27 = DiffusionSampling(
    sampler="ddim", num_inference_steps=27, spacing=(*spaced_timesteps(1000, 27, spacing="10,10,3,2,2")[:-1], 997))
HEUN = DiffusionSampling(sampler="heun", num_inference_steps=18, threshold="none")  # of EDM
DYNAMIC = DiffusionSampling(  # of Imagen: steps of its upsamplers, and the scale that measures them
    sampler="ddpm", num_inference_steps=128, threshold="dynamic", guidance_scale=8.0, noise_level=200)

# Of both transformers of taming-transformers.
TAMING: dict[str, Any] = {
    "global_batch_size": 64, "learning_rate": 64 * 4.5e-6, "betas": (0.9, 0.95), "weight_decay": 0.01,
    "max_grad_norm": None}
PIXELCNN = {"channels": 384, "num_layers": 19, "kernel_size": 5, "cond_drop_prob": 0.0}


def own_images(resolution: int = 256, *, vocab_size: int = 1024, text_length: int = 16) -> SharedParts:
    """Images of the user's own, 1 % held out; samples and measures of all systems with a distance."""
    images = ImagesConfig(
        source="s3://your-bucket/images/*.tar", resolution=resolution, samples_per_shard=1024, holdout_fraction=0.01,
        vocab_size=vocab_size, text_length=text_length)
    samples = SamplesConfig(measured_samples=50_000)
    return SharedParts(images, samples, EvaluationConfig(reference_samples=50_000, held_out_samples=10_000))


def token_branch(
    name: str, tokenizer: str, prior: Training, sampling: TokenSampling, *, condition: str | None = None, **images: int
) -> TokenBranchRecipe:
    """The recipe of a prior over tokens of a published autoencoder, after tokens of a `condition`."""
    prior, model = prior.replace(precision="bf16", **LARGE), AUTOENCODERS[tokenizer].training
    if isinstance(sampling, TransformerSampling):
        sampling = sampling.replace(compile_decoding=True)
    tokens, seen = TokensConfig(precision="bf16"), None
    if condition is not None:
        other = AUTOENCODERS[condition].training
        of_other = tokens.replace(member=other.data.member)
        seen = ConditionRecipe(tokenizer=other, tokens=of_other)
    parts = own_images(model.data.resolution, **images)
    return parts.token_branch(name, model, prior, sampling, tokens=tokens, condition=seen)


def diffusion_branch(
    name: str, resolution: int, base: str, sampling: DiffusionSampling, *,
    guide: tuple[str, float] | None = None, upsamplers: tuple[tuple[str, DiffusionSampling], ...] = (),
    autoencoder: str | None = None, text_encoder: TextEncoderConfig | None = None, **images: int,
) -> DiffusionBranchRecipe:
    """The recipe of published diffusion models.

    Latents and states of captions are made once, by frozen networks. The base reads them at each step; only thumbnails
    of the latents' side are kept of the images. A sample of `ldm_text_to_image` has 16 kB of latents and 394 kB of
    states: where a set is seen about once that is the storage of states for little, and
    `--set 'precompute.columns=[latents]'` makes them at each step. `resolution`: of the images, pixels. `guide`: a
    classifier, and the scale of its guidance. `upsamplers`: each a model, and its sampling."""
    makers: dict[Column, object] = {"latents": autoencoder, "text_states": text_encoder}
    columns = tuple(column for column, maker in makers.items() if maker is not None)
    model, larger = PAPER_DIFFUSION[base], tuple(PAPER_DIFFUSION[upsampler] for upsampler, _ in upsamplers)
    once = PrecomputeConfig(
        columns=columns, resolution=resolution, kept_resolution=model.data.resolution, precision="bf16")
    return own_images(resolution, **images).branch(
        name, model, DiffusionBranchSampling(
            base=sampling, classifier=None if guide is None else ClassifierSampling(guidance_scale=guide[1]),
            upsamplers=tuple(of_upsampler for _, of_upsampler in upsamplers)),
        text_encoder=text_encoder, precompute=once if columns else None, upsamplers=larger,
        autoencoder=None if autoencoder is None else AUTOENCODERS[autoencoder].training.replace(resolution=resolution),
        classifier=None if guide is None else PAPER_CLASSIFIERS[guide[0]])


def dalle_2(name: str) -> DiffusionBranchRecipe:
    """The recipe of DALL-E 2: CLIP, diffusion prior, decoder and two upsamplers.
    Source: Ramesh et al. (2022), appendix C. Published, CLIP sees 256² images by a vision transformer (ViT-H/16) and
    learns with sharpness-aware minimization; ours is a convolutional encoder of the 64² that the decoder learns from.
    Its sizes and rate are ours. Batch and steps are those of the paper: 32,768 pairs, 32 passes over 400 million."""
    matcher = trainings.ContrastiveTraining.of(
        resolution=64, channels=256, channel_mult=(1, 2, 4), num_res_blocks=8, patch_size=4, embedding_dim=1024,
        text_dim=1024, text_layers=24, text_heads=16, **published(390_625, 32_768, 4e-4, warmup_steps=2000))
    prior = trainings.DiffusionPriorTraining.of(
        resolution=64, model_dim=2048, num_layers=24, num_heads=32, cond_drop_prob=0.1,
        **published(600_000, 4096, 1.1e-4, betas=(0.9, 0.96), weight_decay=0.06, ema_decay=0.9999))
    of_prior = DiffusionPriorSampling(num_inference_steps=64, candidates=2)
    last = DiffusionSampling(sampler="ddim", num_inference_steps=15)
    return own_images(1024, vocab_size=50_257, text_length=256).branch(
        name, PAPER_DIFFUSION["dalle_2_decoder"], DiffusionBranchSampling(
            base=ANCESTRAL.replace(guidance_scale=1.25), diffusion_prior=of_prior, upsamplers=(FAST_27, last)),
        contrastive=matcher, diffusion_prior=prior,
        upsamplers=tuple(PAPER_DIFFUSION[f"dalle_2_upsampler_{side}"] for side in (256, 1024)),
        precompute=PrecomputeConfig(
            columns=("image_embedding", "text_states", "text_embedding"), resolution=64, precision="bf16"))


PAPER_RECIPES = {row.name: row for row in (
    *(RecipeRow(name, row.summary,
        lambda name: own_images().one_model(
            name, AUTOENCODERS[name].training, samples=None, evaluation=EvaluationConfig()))
        for name, row in AUTOENCODERS.items()),
    # Esser et al. (2021), table 4 ("cin256"): 48 layers, 24 heads, width 1,536, AdamW (0.9, 0.95), weight decay 0.01;
    # learning rate 4.5e-6 for each image of the batch. Batch and steps are ours.
    RecipeRow("imagenet_class_prior",
        "Class-conditional ImageNet of taming-transformers: 16² tokens of 16,384 codes, a transformer of 1.4 billion.",
        lambda name: token_branch(
            name, "vqgan_imagenet_f16_16384", trainings.PriorTraining.of(
                model_dim=1536, num_heads=24, num_layers=48, conditions=("label",), total_steps=1_000_000, **TAMING),
            TransformerSampling(top_k=600, top_p=0.92))),
    # Taming-transformers, `configs/drin_transformer.yaml`: 24 layers, 16 heads, width 1,024, no dropout, rate for each
    # image of the batch; codes of both share a table there, and it trains on images of animals alone (restricted
    # ImageNet). Depth is relative inverse depth by MiDaS: members `depth.png` of the user's tars. Batch and steps are
    # ours; a condition is never dropped.
    RecipeRow("imagenet_depth_prior",
        "ImageNet after depth of taming-transformers: 16² tokens after 16² of a map, a transformer of 305 million.",
        lambda name: token_branch(
            name, "vqgan_imagenet_f16_1024", trainings.PriorTraining.of(
                model_dim=1024, num_heads=16, num_layers=24,
                conditions=("condition",), class_token=False, cond_drop_prob=0.0,
                total_steps=500_000, **TAMING),
            TransformerSampling(top_k=100), condition="vqgan_imagenet_depth_f16_1024")),
    # kakaobrain/minDALL-E, `configs/dalle_1.3B.yaml`: 42 layers, 24 heads, width 1,536, text vocabulary 16,384;
    # DALL-E's weights of the two likelihoods, 1/8 and 7/8 (Ramesh et al., 2021). Batch, rate and steps are ours.
    RecipeRow("mindalle_text_prior",
        "minDALL-E: 64 text and 16² image tokens in one transformer of 1.3 billion, over a VQ-GAN of 16,384 codes.",
        lambda name: token_branch(
            name, "vqgan_imagenet_f16_16384", trainings.PriorTraining.of(
                model_dim=1536, num_heads=24, num_layers=42, conditions=("text",), text_loss_weight=1 / 8,
                class_token=False, attend_padding=True,
                total_steps=500_000, global_batch_size=512, learning_rate=4.5e-4, betas=(0.9, 0.96),
                weight_decay=0.045),
            TransformerSampling(top_k=256), vocab_size=16_384, text_length=64)),
    # Ramesh et al. (2021), section 2.2 and appendix B: 64 layers, 62 heads of 64, 256 text tokens of 16,384 words, row
    # and column positions, dropout 0.1; 430,000 updates of 1,024 pairs, AdamW (0.9, 0.96), weight decay 0.045, rate
    # 4.5e-4 after 5,000 updates, norms clipped at 4, an average of 0.999, temperature 1. Published, the rate is halved
    # five times where the loss stands still: ours falls along a line to the same 1/32. Attention is sparse there (a
    # row, a column or a window) and whole here, so weights are as many and operations more; a pad of a text has a
    # vector for each place there, and is not looked at here.
    RecipeRow("dalle_text_prior",
        "DALL-E: 256 text and 32² image tokens in one transformer of 12 billion, over its dVAE of 8,192 codes; no GPU "
        "holds its 246 GB, so a profile needs `stages: {prior: {sharding: full}}`.",
        lambda name: token_branch(
            name, "dalle_dvae_f8_8192", trainings.PriorTraining.of(
                model_dim=3968, num_heads=62, num_layers=64, conditions=("text",), text_loss_weight=1 / 8,
                total_steps=430_000, global_batch_size=1024, learning_rate=4.5e-4, betas=(0.9, 0.96),
                weight_decay=0.045, positions="learned_2d", dropout=0.1, warmup_steps=5000, max_grad_norm=4.0,
                final_lr_fraction=1 / 32, sample_every=5000, gradient_checkpointing=True),
            TransformerSampling(), vocab_size=16_384, text_length=256)),
    # Chang et al. (2022), section 4: 24 layers, 8 heads, width 768, dropout and label smoothing 0.1, Adam (0.9, 0.96),
    # 300 epochs in batches of 256, 8 steps at sampling. With its VQ-GAN of 54 million it has 227 million parameters;
    # ours is that of taming-transformers, of 72 million, with attention. Rate and its rise are ours.
    RecipeRow("maskgit_imagenet_256",
        "MaskGIT by class: 16² tokens of 1,024 codes in 8 steps, a transformer of 173 million.",
        lambda name: token_branch(
            name, "vqgan_imagenet_f16_1024", trainings.MaskedPriorTraining.of(
                model_dim=768, num_layers=24, num_heads=8, dropout=0.1, label_smoothing=0.1, cond_drop_prob=0.0,
                **published(1_501_200, 256, 1e-4, betas=(0.9, 0.96), warmup_steps=5000)),
            MaskedTokenSampling(num_inference_steps=8))),
    # Of the prior van den Oord et al. (2017), section 4.2, say that it is a PixelCNN by class over 32² codes: network,
    # batch and steps are those of the gated one below, the rate is ours.
    RecipeRow("vqvae_imagenet_128_pixelcnn",
        "VQ-VAE's prior: a gated PixelCNN by class over 32² tokens of 512 codes of 128² images.",
        lambda name: token_branch(
            name, "vqvae_imagenet_128", trainings.PixelTraining.of(
                network="pixelcnn", **PIXELCNN, **published(200_000, 128, 1e-4)), TokenSampling())),
    # Van den Oord et al. (2016), section 3: 20 layers of 384 features, kernels of 5, 200,000 updates of 128 images. The
    # rate is ours, and Adam in place of RMSProp.
    RecipeRow("pixelcnn_imagenet_32", "Gated PixelCNN by class on ImageNet, 32², with bits/dim of held-out images.",
        lambda name: own_images(32).one_model(name, trainings.PixelTraining.of(
            network="pixelcnn", resolution=32, **PIXELCNN, **published(200_000, 128, 1e-4)),
            likelihood=LikelihoodConfig())),
    # Brock et al. (2019), appendix B and table 1, with the flags of ajbrock/BigGAN-PyTorch: a step of the discriminator
    # for one of the generator at twice the paper's rates, as there. Ours has no orthogonal regularization, as there; no
    # biases before norms, and queries and values as wide as features in attention.
    RecipeRow("biggan_imagenet_128", "BigGAN by class, 128²: a class vector that all norms share, noise in each block.",
        lambda name: own_images(128).one_model(name, trainings.GANTraining.of(
            resolution=128, channels=96, channel_mult=(1, 2, 4, 8, 16), attention_resolutions=(64,), noise_dim=120,
            shared_dim=128, discriminator_channels=96, discriminator_channel_mult=(1, 2, 4, 8, 16),
            discriminator_learning_rate=4e-4,
            **published(150_000, 2048, 1e-4, betas=(0.0, 0.999), ema_decay=0.9999)))),
    RecipeRow("ddpm_cifar_10", "DDPM on CIFAR-10, 32².",
        lambda name: diffusion_branch(name, 32, name, ANCESTRAL_1000)),
    RecipeRow("iddpm_imagenet_64", "Improved DDPM on ImageNet, 64².",
        lambda name: diffusion_branch(name, 64, name, ANCESTRAL)),
    RecipeRow("adm_imagenet_64_256",
        "ADM at 64², guided by its classifier at scale 1, and its upsampler to 256² (ADM-G, ADM-U).",
        lambda name: diffusion_branch(
            name, 256, "adm_imagenet_64", ANCESTRAL, guide=("adm_classifier_64", 1.0),
            upsamplers=(("adm_upsampler_64_256", ANCESTRAL),))),
    RecipeRow("adm_imagenet_128_512",
        "ADM at 128², guided by its classifier at scale 0.5, and its upsampler to 512² (ADM-G, ADM-U).",
        lambda name: diffusion_branch(
            name, 512, "adm_imagenet_128", ANCESTRAL, guide=("adm_classifier_128", 0.5),
            upsamplers=(("adm_upsampler_128_512", ANCESTRAL),))),
    RecipeRow("adm_imagenet_256", "ADM at 256² in one model, guided by its classifier at scale 1.",
        lambda name: diffusion_branch(name, 256, name, ANCESTRAL, guide=("adm_classifier_256", 1.0))),
    RecipeRow("adm_imagenet_256_unconditional",
        "ADM at 256² that knows no class, guided by the classifier alone at scale 10.",
        lambda name: diffusion_branch(name, 256, name, ANCESTRAL, guide=("adm_classifier_256", 10.0))),
    RecipeRow("adm_imagenet_512", "ADM at 512² in one model, guided by its classifier at scale 4.",
        lambda name: diffusion_branch(name, 512, name, ANCESTRAL, guide=("adm_classifier_512", 4.0))),
    RecipeRow("cdm_imagenet_64_256",
        "CDM: an upsampler to 256² with conditioning augmentation. ADM's base stands in for that of the paper.",
        lambda name: diffusion_branch(
            name, 256, "adm_imagenet_64", ANCESTRAL,
            upsamplers=(("cdm_upsampler_64_256", ANCESTRAL.replace(noise_level=200)),))),
    RecipeRow("glide_64_256",
        "GLIDE by text, 64² and its upsampler to 256². A vocabulary of 50,257 words, texts of 128.",
        lambda name: diffusion_branch(
            name, 256, "glide_base", ANCESTRAL.replace(guidance_scale=3.0),
            upsamplers=(("glide_upsampler", FAST_27),),
            vocab_size=50_257, text_length=128)),
    RecipeRow("edm_imagenet_64", "EDM by class, 64², the network of ADM, Heun's sampler.",
        lambda name: diffusion_branch(name, 64, name, HEUN.replace(num_inference_steps=40))),
    RecipeRow("edm_cifar_10", "EDM on CIFAR-10, 32², DDPM++, Heun's sampler.",
        lambda name: diffusion_branch(name, 32, name, HEUN)),
    RecipeRow("dalle_2_64_1024",
        "DALL-E 2: CLIP, a diffusion prior, a decoder at 64², upsamplers to 256² and 1024².", dalle_2),
    # States of 128 tokens, as in NVIDIA/NeMo. Scale of the base and steps are those of the paper's measures on COCO.
    RecipeRow("imagen_64_1024", "Imagen: 64² by the states of a frozen T5-XXL, upsamplers to 256² and 1024².",
        lambda name: diffusion_branch(
            name, 1024, "imagen_base", DYNAMIC.replace(num_inference_steps=256, guidance_scale=1.35, noise_level=None),
            upsamplers=(("imagen_upsampler_256", DYNAMIC), ("imagen_upsampler_1024", DYNAMIC)),
            text_encoder=TextEncoderConfig(uri="s3://your-bucket/t5-v1_1-xxl", length=128))),
    RecipeRow("ldm_ffhq_f4", "Latent diffusion on faces, 256², in the latents of vq-f4.",
        lambda name: diffusion_branch(name, 256, name, LATENT, autoencoder="ldm_vq_f4")),
    RecipeRow("ldm_imagenet_f8", "Latent diffusion by class, 256², in the latents of vq-f8.",
        lambda name: diffusion_branch(name, 256, name, LATENT, autoencoder="ldm_vq_f8")),
    RecipeRow("ldm_imagenet_f4", "Latent diffusion by class, 256², in the latents of vq-f4.",
        lambda name: diffusion_branch(
            name, 256, name, LATENT.replace(guidance_scale=1.5), autoencoder="ldm_vq_f4")),
    RecipeRow("ldm_text_to_image",
        "Latent diffusion by text, 256², in the latents of kl-f8; any encoder with 77 states of 1,280 features a text.",
        lambda name: diffusion_branch(
            name, 256, name, LATENT.replace(guidance_scale=5.0), autoencoder="ldm_kl_f8",
            text_encoder=TextEncoderConfig(uri="s3://your-bucket/text-encoder", length=77, pads="attended"))),
    # Its first stage learned at 256²; sampled in 50 steps by PLMS, for which DDIM stands here.
    RecipeRow("stable_diffusion_v1",
        "Stable Diffusion v1 by text, 512², in the latents of kl-f8, with the text encoder of CLIP ViT-L/14.",
        lambda name: diffusion_branch(
            name, 512, name, LATENT.replace(num_inference_steps=50, guidance_scale=7.5), autoencoder="ldm_kl_f8",
            text_encoder=TextEncoderConfig(uri="s3://your-bucket/clip-vit-large-patch14", length=77, pads="attended"))),
    # Table 4 of Peebles and Xie (2023): guidance 1.5, which moves three of the four channels in their code.
    RecipeRow("dit_imagenet_256", "DiT-XL/2 by class, 256², in the latents of kl-f8.",
        lambda name: diffusion_branch(
            name, 256, name, ANCESTRAL.replace(threshold="none", guidance_scale=1.5, guided_channels=3),
            autoencoder="ldm_kl_f8")),
    RecipeRow("palette_256",
        "Palette at 256², one model for inpainting, uncropping, colorization, JPEG and super-resolution.",
        lambda name: ImageToImageRecipe(
            name=name, images=own_images().images, model=PAPER_DIFFUSION["palette"],
            sampling=RestorationSampling(model=ANCESTRAL_1000), restoration=RestorationConfig(samples=1000))),
)}
# fmt: on
