"""Rows of the lecture from diffusion on: a recipe for each system, minutes on two cores.

Images are those of the rows before diffusion, and the autoencoder of latent diffusion is the row `vae_gan`. Rows on
Fashion-MNIST, at its own 28², are studies: likelihoods of its one channel, samplers by steps, guidance by scale. Those
likelihoods are of the same held-out images, none conditioned on a class: a PixelCNN's are exact, those of diffusion are
bounds, and the PNGs of the images stand beside.
"""

from collections.abc import Sequence
from itertools import pairwise

from components.configuration.diffusion import DegradationConfig, DiffusionTraining
from components.configuration.networks import DiTConfig
from components.configuration.sampling import (
    DiffusionBranchSampling,
    DiffusionPriorSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.restoration import RestorationConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.models.diffusion.steps import SAMPLERS
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes import systems
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe, ImageToImageRecipe
from pipelines.recipes.rows import EMOJI, EVALUATION, SCENES
from pipelines.recipes.shapes import OneModelRecipe, SharedParts
from pipelines.recipes.systems import ANCESTRAL, ANCESTRAL_250, SKETCH, diffusion, sketching

ENLARGED = SKETCH.replace(num_inference_steps=11, strength=0.55, noise_level=50)  # the last six, from the low-res image
RESTORED = DiffusionSampling(sampler="ddpm", num_inference_steps=10)
REFERENCE = 5000  # training images of Fashion-MNIST that distances are measured to
# fmt: off
FASHION_MNIST = SharedParts(
    ImagesConfig(
        source="fashion_mnist", resolution=28, samples_per_shard=2000, holdout_fraction=0.05,
        vocab_size=300, text_length=8),
    SamplesConfig(measured_samples=256, images_per_class=8, num_prompts=0),
    EvaluationConfig(reference_samples=REFERENCE))
# fmt: on
FASHION_BOUND = LikelihoodConfig(samples=256, timesteps_per_image=125)  # all 1,000: eight times the minutes


def ddpm() -> DiffusionStudiesRecipe:
    """D1: DDPM at 16², linear schedule, noise prediction, L_simple; 100 steps; forward process at 64²."""
    sampling, noising = ANCESTRAL.replace(num_inference_steps=100), NoisingStudyConfig(resolution=64)
    return EMOJI.studies("ddpm", systems.as_ddpm(diffusion()), sampling, noising_study=noising)


def dit() -> DiffusionBranchRecipe:
    """D5: a diffusion transformer (DiT) at 16² by class, patches of 2²."""
    base = sketching().replace(network=DiTConfig(patch_size=2, model_dim=160, num_layers=6, num_heads=5))
    return EMOJI.branch("dit", base, SKETCH.replace(guidance_scale=1.5))


def classifier_guided() -> DiffusionBranchRecipe:
    """D6: a conditional model at 16², guided by the gradient of a classifier of noisy images."""
    guide = systems.classifier(16, 32, (1, 2), 8, noisy=True, steps=300)
    return EMOJI.branch("classifier_guided", sketching().replace(total_steps=1000), SKETCH, classifier=guide)


def class_guided() -> DiffusionBranchRecipe:
    """D7: classifier-free guidance by class at 16², inside an interval of noise levels only."""
    sampling = SKETCH.replace(guidance_scale=2.0, guidance_interval=(0.2, 5.0))
    return EMOJI.branch("class_guided", sketching(), sampling)


def glide() -> DiffusionBranchRecipe:
    """D8: GLIDE at 16², cross-attention to a text transformer's states, classifier-free guidance."""
    base = sketching().replace(conditions=("text",), text_conditioning="cross_attention", cond_drop_prob=0.2)
    return EMOJI.branch("glide", base, SKETCH.replace(guidance_scale=3.0))


def edm() -> DiffusionBranchRecipe:
    """D15: EDM at 16² by class, preconditioning, Heun's sampler, power averages of the weights."""
    base = diffusion().replace(process="edm", ema="power", ema_sigma_rel=0.1)
    return EMOJI.branch("edm", base, DiffusionSampling(sampler="heun", num_inference_steps=12))


def flow() -> DiffusionBranchRecipe:
    """D15: rectified flow at 16² by class, Euler's steps."""
    sampling = DiffusionSampling(sampler="euler", num_inference_steps=25)
    return EMOJI.branch("flow", diffusion().replace(process="flow"), sampling)


def flow_logit_normal() -> DiffusionBranchRecipe:
    """D15: the same flow, trained in the middle of its paths more often than at their ends."""
    base = flow().base.replace(time_density="logit_normal")
    return flow().replace(name="flow_logit_normal", base=base)


def zero_terminal_snr() -> DiffusionBranchRecipe:
    """D15: v-prediction, zero terminal SNR, sampled from the very last step, guidance rescaled."""
    base = diffusion().replace(zero_terminal_snr=True, min_snr_gamma=None)
    sampling = ANCESTRAL.replace(sampler="ddim", spacing="trailing", guidance_scale=2.0, guidance_rescale=0.7)
    return EMOJI.branch("zero_terminal_snr", base, sampling)


def autoguidance() -> DiffusionBranchRecipe:
    """D15: autoguidance by class at 16², away from a model of half the width and a quarter of the steps."""
    weaker = sketching().replace(model_channels=16, total_steps=330, sample_every=330)
    return EMOJI.branch("autoguidance", sketching(), SKETCH.replace(autoguidance_scale=2.0), weaker=weaker)


def latent_diffusion() -> DiffusionBranchRecipe:
    """D13: latent diffusion by class in the 16² x 4 latents of the VAE-GAN of 64² images."""
    return in_latents("latent_diffusion", diffusion(), guidance_scale=1.5)


def stable_diffusion() -> DiffusionBranchRecipe:
    """D13: Stable Diffusion's shape, the same latents by caption through spatial transformers."""
    base = diffusion().replace(
        conditions=("text",), text_conditioning="spatial_transformer", cond_drop_prob=0.2, total_steps=1000
    )
    return in_latents("stable_diffusion", base, guidance_scale=3.0)


def imagen() -> DiffusionBranchRecipe:
    """D14: Imagen, 16² to 32², a frozen text encoder's states, dynamic thresholding, strong guidance."""
    base = by_text_states(sketching()).replace(total_steps=1000)
    upsampler = by_text_states(sketching(32)).replace(low_res_resolution=16, total_steps=700, sample_every=350)
    dynamic = SKETCH.replace(threshold="dynamic", threshold_percentile=0.95)
    # The upsampler takes the last eight of 14 steps, from the 16² image.
    enlarging = dynamic.replace(guidance_scale=1.5, num_inference_steps=14, strength=0.57, noise_level=50)
    sampling = DiffusionBranchSampling(base=dynamic.replace(guidance_scale=4.0), upsamplers=(enlarging,))
    once = PrecomputeConfig(columns=("text_states",), resolution=16)
    return EMOJI.branch(
        "imagen", base, sampling, contrastive=systems.contrastive(), upsamplers=(upsampler,), precompute=once
    )


def dalle2() -> DiffusionBranchRecipe:
    """D14: DALL-E 2 at 16², contrastive encoder, diffusion prior from text to image embedding, decoder."""
    encoder, prior = systems.contrastive(), systems.diffusion_prior()
    dim = encoder.network.embedding_dim
    base = sketching().replace(conditions=("image_embedding",), image_embedding_dim=dim, total_steps=1000)
    embeddings = DiffusionPriorSampling(sampler="dpm_solver_pp", num_inference_steps=16, guidance_scale=1.5)
    sampling = DiffusionBranchSampling(base=SKETCH.replace(guidance_scale=1.5), diffusion_prior=embeddings)
    once = PrecomputeConfig(columns=("image_embedding", "text_states", "text_embedding"), resolution=16)
    return EMOJI.branch("dalle2", base, sampling, contrastive=encoder, diffusion_prior=prior, precompute=once)


def depth_diffusion() -> DiffusionBranchRecipe:
    """D9: from a depth map to an image of the scene at 32², the map concatenated to what is denoised."""
    base = sketching(32).replace(conditions=("condition_image",), condition_member="depth")
    return SCENES.branch("depth_diffusion", base, SKETCH)


def image_cross_attention() -> DiffusionBranchRecipe:
    """D9: the same, the map seen by cross-attention, as a token for each patch of 4² pixels."""
    base = depth_diffusion().base.replace(network="image_attention_unet", text_conditioning="cross_attention")
    return SCENES.branch("image_cross_attention", base, SKETCH)


def glide_inpainting() -> ImageToImageRecipe:
    """D8: text-guided inpainting of 32² images (GLIDE): a mask is filled as its caption says."""
    model = restoring().replace(
        tasks=("inpainting",), conditions=("text",), text_conditioning="cross_attention", cond_drop_prob=0.2
    )
    return restored("glide_inpainting", model, RESTORED.replace(guidance_scale=2.0))


def super_resolution() -> ImageToImageRecipe:
    """D10: super-resolution, 16² or 8² to 32², pairs by antialiased downsampling."""
    return restored("super_resolution", restoring().replace(tasks=("super_resolution",)), RESTORED)


def palette() -> ImageToImageRecipe:
    """D12: Palette at 32², inpainting, uncropping, colorization, JPEG and super-resolution by one model."""
    return restored("palette", restoring(), RESTORED)


def cascade_1024() -> DiffusionBranchRecipe:
    """D11: 1024² by four trained stages: the demo's 16² and 64², then upsamplers to 256² and 1024²."""
    images = systems.emoji(1024).replace(limit=1024, samples_per_shard=64)
    samples = SamplesConfig(measured_samples=0, images_per_class=1, num_prompts=0)
    shared = SharedParts(images, samples, EVALUATION.replace(feature_network="none"))
    return beyond_the_demo("cascade_1024", (256, 1024), shared)


def cascade_256() -> DiffusionBranchRecipe:
    """D11: the demo's stages and a third to 256²; distances at each size and of windows of 64²."""
    samples = SamplesConfig(measured_samples=256, images_per_class=1, num_prompts=0)
    return beyond_the_demo(
        "cascade_256", (256,), SharedParts(systems.emoji(256), samples, EVALUATION.replace(window=64))
    )


def fashion_steps() -> DiffusionStudiesRecipe:
    """D4: fewer steps, Fréchet distance of every sampler at 5 to 50 steps and of 250 ancestral ones."""
    study = StepsStudyConfig(samplers=tuple(SAMPLERS), reference_samples=REFERENCE)
    return FASHION_MNIST.studies("fashion_steps", fashion_sketching(), steps_study=study)


def fashion_guidance() -> DiffusionStudiesRecipe:
    """D6: guidance by a classifier, classifier-free, inside an interval, and by a weaker model."""
    base, methods = fashion_sketching(), ("classifier", "classifier_free", "interval", "autoguidance")
    guide, judge = (systems.classifier(28, 16, (1, 2, 4), 7, noisy=noisy, steps=500) for noisy in (True, False))
    weaker = base.replace(total_steps=300, checkpoint_every=300, sample_every=300)
    sampling = {"sampler": "sde_dpm_solver_pp", "num_inference_steps": 15, "samples": 512}
    study = GuidanceStudyConfig.of(methods=methods, reference_samples=REFERENCE, **sampling)
    models = {"weaker": weaker, "classifier": guide, "judge": judge}
    return FASHION_MNIST.studies("fashion_guidance", base, **models, guidance_study=study)


def fashion_pixelcnn() -> OneModelRecipe:
    """P1: gated PixelCNN over gray pixels at 28², exact bits/dim."""
    model = systems.pixelcnn().replace(resolution=28, in_channels=1, conditions=(), channels=32, total_steps=600)
    return FASHION_MNIST.one_model("fashion_pixelcnn", model)


def fashion_likelihood_ddpm() -> DiffusionStudiesRecipe:
    """D2: variational bound of DDPM, linear schedule, fixed large variance, in three terms."""
    return FASHION_MNIST.studies("fashion_likelihood_ddpm", systems.as_ddpm(fashion_gray()), likelihood=FASHION_BOUND)


def fashion_likelihood_bound() -> DiffusionStudiesRecipe:
    """D2: the same model trained on the bound itself, the objective of 2015."""
    base = systems.as_ddpm(fashion_gray()).replace(loss="vlb")
    return FASHION_MNIST.studies("fashion_likelihood_bound", base, likelihood=FASHION_BOUND)


def fashion_likelihood_hybrid() -> DiffusionStudiesRecipe:
    """D3: variational bound of Improved DDPM, cosine schedule, learned variance, in three terms."""
    base = systems.as_improved_ddpm(fashion_gray())
    return FASHION_MNIST.studies("fashion_likelihood_hybrid", base, ANCESTRAL_250, likelihood=FASHION_BOUND)


def fashion_likelihood_loss_aware() -> DiffusionStudiesRecipe:
    """D3: Improved DDPM trained on the bound itself, its timesteps drawn by their losses from step 490 on."""
    # Of 1,000 timesteps some would be drawn less than ten times in half of the training.
    base = systems.as_improved_ddpm(fashion_gray())
    base = base.replace(loss="vlb", num_train_timesteps=500, timestep_sampling="loss_aware")
    return FASHION_MNIST.studies("fashion_likelihood_loss_aware", base, ANCESTRAL_250, likelihood=FASHION_BOUND)


FASHION = (
    *(fashion_pixelcnn, fashion_likelihood_ddpm, fashion_likelihood_bound, fashion_likelihood_hybrid),
    *(fashion_likelihood_loss_aware, fashion_steps, fashion_guidance),
)
DIFFUSION_ROWS = (
    *(ddpm, dit, classifier_guided, class_guided, glide, glide_inpainting, depth_diffusion, image_cross_attention),
    *(super_resolution, cascade_1024, cascade_256, palette, latent_diffusion, stable_diffusion, imagen, dalle2),
    *(edm, flow, flow_logit_normal, zero_terminal_snr, autoguidance),
)


def in_latents(name: str, base: DiffusionTraining, *, guidance_scale: float) -> DiffusionBranchRecipe:
    """A recipe in the latents of row T1's VAE-GAN, made once."""
    autoencoder, sampling = systems.vae_gan(), ANCESTRAL.replace(threshold="none", guidance_scale=guidance_scale)
    once = PrecomputeConfig(columns=("latents",), resolution=autoencoder.data.resolution, kept_resolution=16)
    return EMOJI.branch(name, base.replace(in_channels=4), sampling, autoencoder=autoencoder, precompute=once)


def by_text_states(training: DiffusionTraining) -> DiffusionTraining:
    """The training by caption, as states of the rows' contrastive encoder."""
    dim = systems.contrastive().text.text_dim
    return training.replace(conditions=("text_states",), text_conditioning="cross_attention", text_states_dim=dim)


def restoring() -> DiffusionTraining:
    """A U-Net at 32² with a degraded image as condition."""
    return diffusion(32).replace(conditions=(), degradation=DegradationConfig())


def restored(name: str, model: DiffusionTraining, sampling: DiffusionSampling) -> ImageToImageRecipe:
    """A recipe of restoring the demo's images."""
    parts = {
        "sampling": RestorationSampling(model=sampling),
        "restoration": RestorationConfig(samples=48, reference_samples=1024),
    }
    return ImageToImageRecipe.of(name=name, images=systems.emoji(), model=model, **parts)


def beyond_the_demo(name: str, resolutions: Sequence[int], shared: SharedParts) -> DiffusionBranchRecipe:
    """A recipe of the demo's stages and an upsampler to each further resolution, trained on windows."""
    demo, sides = systems.openmoji(), (64, *resolutions)
    sampling = DiffusionBranchSampling(
        base=demo.sampling.base, upsamplers=(*demo.sampling.upsamplers, *[ENLARGED] * len(resolutions))
    )
    enlarging = [enlarger(low_res, resolution) for low_res, resolution in pairwise(sides)]
    return shared.branch(name, demo.base, sampling, upsamplers=(*demo.upsamplers, *enlarging))


def enlarger(low_res: int, resolution: int) -> DiffusionTraining:
    """Four times as large; trained on windows of 64² without attention, and then run on whole images."""
    base = systems.unet(resolution, 16, (1, 2, 4), (), steps=300, batch=8, saves=2)
    base = base.replace(prediction_type="sample", conditions=(), cond_drop_prob=0.0)
    return base.replace(low_res_resolution=low_res, crop_size=64, max_noise_level=300)


def fashion_sketching() -> DiffusionTraining:
    """28² by class; x_0 predicted has half the distance of v-prediction after 15 steps."""
    # Width 32 costs twice the time, in training and in each of the studies' evaluations.
    return systems.unet(28, 16, (1, 2, 4), (7,), steps=2300, batch=24, rate=1.5e-3).replace(prediction_type="sample")


def fashion_gray() -> DiffusionTraining:
    """The training with one channel and fewer steps, for likelihoods."""
    return systems.unet(28, 16, (1, 2, 4), (7,), steps=1200, batch=24, rate=1.5e-3, saves=3).replace(in_channels=1)
