"""The rows of the lecture from diffusion on: each system by its own recipe, minutes on two cores.

The images are those of the rows before diffusion, and the autoencoder of latent diffusion is the row `vae_gan`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from components.configuration.diffusion import DegradationConfig, DiffusionTraining
from components.configuration.networks import DiTConfig, ImageAttentionUNetConfig
from components.configuration.sampling import (
    DiffusionBranchSampling,
    DiffusionPriorSampling,
    DiffusionSampling,
    RestorationSampling,
)
from components.configuration.trainings import ClassifierTraining, DiffusionPriorTraining
from components.evaluation.noising_study import NoisingStudyConfig
from components.stages.images import ImagesConfig
from components.stages.precompute import PrecomputeConfig
from components.stages.restoration import RestorationConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe, ImageToImageRecipe
from pipelines.recipes.discrete_rows import EVALUATION, SAMPLES, emoji, scenes, vae_gan_autoencoder
from pipelines.recipes.openmoji import openmoji
from pipelines.recipes.row_encoder import contrastive

ANCESTRAL = DiffusionSampling(sampler="ddpm", num_inference_steps=15)  # its noise cures the grain of brief training
SKETCH = DiffusionSampling(sampler="sde_dpm_solver_pp", num_inference_steps=15)  # where x_0 is predicted
ENLARGED = SKETCH.replace(num_inference_steps=11, strength=0.55, noise_level=50)  # the last six, from the low-res image
RESTORED = DiffusionSampling(sampler="ddpm", num_inference_steps=10)


def ddpm() -> DiffusionStudiesRecipe:
    """D1: DDPM at 16², linear schedule, noise prediction, L_simple; 100 ancestral steps; the forward process at 64²."""
    base = diffusion().replace(
        conditions=(), schedule="linear", prediction_type="epsilon", min_snr_gamma=None, variance="fixed_large"
    )
    return DiffusionStudiesRecipe(
        name="ddpm",
        images=emoji(),
        base=base,
        sampling=DiffusionBranchSampling(base=DiffusionSampling(sampler="ddpm", num_inference_steps=100)),
        samples=SAMPLES,
        noising_study=NoisingStudyConfig(resolution=64),
        evaluation=EVALUATION,
    )


def dit() -> DiffusionBranchRecipe:
    """D5: a diffusion transformer (DiT) at 16² by class, patches of 2²."""
    base = sketching().replace(network=DiTConfig(patch_size=2, model_dim=160, num_layers=6, num_heads=5))
    return branch("dit", base, SKETCH.replace(guidance_scale=1.5))


def classifier_guided() -> DiffusionBranchRecipe:
    """D6: a conditional model at 16², pulled towards its class by the gradient of a classifier of noisy images."""
    classifier = ClassifierTraining.of(
        resolution=16,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        noisy=True,
        total_steps=300,
        global_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=150,
        sample_every=300,
    )
    return branch("classifier_guided", sketching().replace(total_steps=1000), SKETCH, classifier=classifier)


def class_guided() -> DiffusionBranchRecipe:
    """D7: classifier-free guidance by class at 16², inside an interval of noise levels only."""
    sampling = SKETCH.replace(guidance_scale=2.0, guidance_interval=(0.2, 5.0))
    return branch("class_guided", sketching(), sampling)


def glide() -> DiffusionBranchRecipe:
    """D8: GLIDE at 16², captions by cross-attention to the states of a text transformer, classifier-free guidance."""
    base = sketching().replace(conditions=("text",), text_conditioning="cross_attention", cond_drop_prob=0.2)
    return branch("glide", base, SKETCH.replace(guidance_scale=3.0))


def edm() -> DiffusionBranchRecipe:
    """D15: EDM at 16² by class, preconditioning, Heun's sampler, an average whose length is chosen after training."""
    base = diffusion().replace(process="edm", ema="power", ema_sigma_rel=0.1)
    return branch("edm", base, DiffusionSampling(sampler="heun", num_inference_steps=12))


def flow() -> DiffusionBranchRecipe:
    """D15: rectified flow at 16² by class, Euler's steps."""
    sampling = DiffusionSampling(sampler="euler", num_inference_steps=25)
    return branch("flow", diffusion().replace(process="flow"), sampling)


def flow_logit_normal() -> DiffusionBranchRecipe:
    """D15: the same flow, trained in the middle of its paths more often than at their ends."""
    base = flow().base.replace(time_density="logit_normal")
    return branch("flow_logit_normal", base, flow().sampling)


def zero_terminal_snr() -> DiffusionBranchRecipe:
    """D15: v-prediction with a schedule that ends in pure noise, sampled from its very last step, guidance rescaled."""
    base = diffusion().replace(zero_terminal_snr=True, min_snr_gamma=None)
    guided = {"guidance_scale": 2.0, "guidance_rescale": 0.7}
    return branch("zero_terminal_snr", base, ANCESTRAL.replace(sampler="ddim", spacing="trailing", **guided))


def autoguidance() -> DiffusionBranchRecipe:
    """D15: autoguidance by class at 16², away from a model of half the width and a quarter of the steps."""
    weaker = sketching().replace(model_channels=16, total_steps=330, sample_every=330)
    return branch("autoguidance", sketching(), SKETCH.replace(autoguidance_scale=2.0), weaker=weaker)


def latent_diffusion() -> DiffusionBranchRecipe:
    """D13: latent diffusion by class in the 16² x 4 latents of the VAE-GAN of 64² images."""
    return in_latents("latent_diffusion", diffusion(), guidance_scale=1.5)


def stable_diffusion() -> DiffusionBranchRecipe:
    """D13: Stable Diffusion's shape, the same latents by caption, whose states spatial transformers attend to."""
    base = diffusion().replace(
        conditions=("text",), text_conditioning="spatial_transformer", cond_drop_prob=0.2, total_steps=1000
    )
    return in_latents("stable_diffusion", base, guidance_scale=3.0)


def imagen() -> DiffusionBranchRecipe:
    """D14: Imagen, 16² to 32², both stages by a frozen text encoder's states, dynamic thresholding, strong guidance."""
    heard = {
        "conditions": ("text_states",),
        "text_conditioning": "cross_attention",
        "text_states_dim": contrastive().text.text_dim,
    }
    base = sketching().replace(total_steps=1000, **heard)
    upsampler = at_32(sketching()).replace(low_res_resolution=16, total_steps=700, sample_every=350, **heard)
    dynamic = SKETCH.replace(threshold="dynamic", threshold_percentile=0.95)
    enlarging = {"num_inference_steps": 14, "strength": 0.57, "noise_level": 50}  # the last eight, from the 16² image
    sampling = DiffusionBranchSampling(
        base=dynamic.replace(guidance_scale=4.0), upsamplers=(dynamic.replace(guidance_scale=1.5, **enlarging),)
    )
    once = PrecomputeConfig(columns=("text_states",), resolution=16)
    return branch("imagen", base, sampling, contrastive=contrastive(), upsamplers=(upsampler,), precompute=once)


def dalle2() -> DiffusionBranchRecipe:
    """D14: DALL-E 2 at 16², contrastive encoder, diffusion prior from text to image embedding, decoder of those."""
    prior = DiffusionPriorTraining.of(
        resolution=16,
        model_dim=128,
        num_layers=4,
        num_heads=4,
        total_steps=300,
        global_batch_size=64,
        learning_rate=1e-3,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=300,
    )
    base = sketching().replace(
        conditions=("image_embedding",),
        image_embedding_dim=contrastive().network.embedding_dim,
        total_steps=1000,
    )
    embeddings = DiffusionPriorSampling(sampler="dpm_solver_pp", num_inference_steps=16, guidance_scale=1.5)
    sampling = DiffusionBranchSampling(base=SKETCH.replace(guidance_scale=1.5), diffusion_prior=embeddings)
    once = PrecomputeConfig(columns=("image_embedding", "text_states", "text_embedding"), resolution=16)
    return branch("dalle2", base, sampling, contrastive=contrastive(), diffusion_prior=prior, precompute=once)


def depth_diffusion() -> DiffusionBranchRecipe:
    """D9: from a depth map to an image of the scene at 32², the map concatenated to what is denoised."""
    base = at_32(sketching()).replace(conditions=("condition_image",), condition_member="depth")
    return branch("depth_diffusion", base, SKETCH, images=scenes())


def image_cross_attention() -> DiffusionBranchRecipe:
    """D9: the same, the map seen by cross-attention, as a token for each patch of 4² pixels."""
    base = at_32(sketching()).replace(conditions=("condition_image",), condition_member="depth")
    shape = base.network.model_dump(exclude={"kind", "text_conditioning"})
    return branch(
        "image_cross_attention", base.replace(network=ImageAttentionUNetConfig(**shape)), SKETCH, images=scenes()
    )


def glide_inpainting() -> ImageToImageRecipe:
    """D8: text-guided inpainting of 32² images (GLIDE): a mask is filled as its caption says."""
    model = restoring().replace(
        tasks=("inpainting",), conditions=("text",), text_conditioning="cross_attention", cond_drop_prob=0.2
    )
    return restored("glide_inpainting", model, RESTORED.replace(guidance_scale=2.0))


def super_resolution() -> ImageToImageRecipe:
    """D10: super-resolution, 16² or 8² to 32², pairs by antialiased downsampling."""
    return restored("super_resolution", restoring().replace(tasks=("super_resolution",)))


def palette() -> ImageToImageRecipe:
    """D12: Palette at 32², inpainting, uncropping, colorization, JPEG and super-resolution by one model."""
    return restored("palette", restoring())


def cascade_1024() -> DiffusionBranchRecipe:
    """D11: images of 1024² through four trained stages: the demo's 16² and 64², then upsamplers to 256² and 1024²."""
    images = emoji(resolution=1024).replace(limit=1024, samples_per_shard=64)
    samples = SamplesConfig(measured_samples=0, images_per_class=1, num_prompts=0)
    evaluation = EVALUATION.replace(feature_network="none")
    return beyond_the_demo("cascade_1024", (256, 1024), images=images, samples=samples, evaluation=evaluation)


def cascade_256() -> DiffusionBranchRecipe:
    """D11: the demo's stages, 16² and 64², and a third to 256²; with distances at each size and of windows of 64²."""
    samples = SamplesConfig(measured_samples=256, images_per_class=1, num_prompts=0)
    evaluation = EVALUATION.replace(window=64)
    return beyond_the_demo("cascade_256", (256,), images=emoji(resolution=256), samples=samples, evaluation=evaluation)


def beyond_the_demo(name: str, resolutions: Sequence[int], **parts: Any) -> DiffusionBranchRecipe:
    """A recipe of the demo's stages, 16² and 64², and an upsampler to each further resolution, trained on windows."""
    demo, sizes = openmoji(), (64, *resolutions)
    sampling = DiffusionBranchSampling(
        base=demo.sampling.base, upsamplers=(*demo.sampling.upsamplers, *[ENLARGED] * len(resolutions))
    )
    enlarged = [enlarging(low_res, resolution) for low_res, resolution in pairwise(sizes)]
    return DiffusionBranchRecipe(
        name=name, base=demo.base, upsamplers=(*demo.upsamplers, *enlarged), sampling=sampling, **parts
    )


def enlarging(low_res: int, resolution: int) -> DiffusionTraining:
    """Four times as large; trained on windows of 64² without attention, and then run on whole images."""
    return sketching().replace(
        resolution=resolution,
        low_res_resolution=low_res,
        crop_size=64,
        model_channels=16,
        channel_mult=(1, 2, 4),
        attention_resolutions=(),
        conditions=(),
        cond_drop_prob=0.0,
        global_batch_size=8,
        total_steps=300,
        max_noise_level=300,
        checkpoint_every=150,
        sample_every=150,
    )


DIFFUSION_ROWS: dict[Callable[[], DiffusionBranchRecipe | DiffusionStudiesRecipe | ImageToImageRecipe], str] = {
    ddpm: "D1",
    dit: "D5",
    classifier_guided: "D6",
    class_guided: "D7",
    glide: "D8",
    glide_inpainting: "D8",
    depth_diffusion: "D9",
    image_cross_attention: "D9",
    super_resolution: "D10",
    cascade_1024: "D11",
    cascade_256: "D11",
    palette: "D12",
    latent_diffusion: "D13",
    stable_diffusion: "D13",
    imagen: "D14",
    dalle2: "D14",
    edm: "D15",
    flow: "D15",
    flow_logit_normal: "D15",
    zero_terminal_snr: "D15",
    autoguidance: "D15",
}


def branch(
    name: str,
    base: DiffusionTraining,
    sampling: DiffusionSampling | DiffusionBranchSampling,
    *,
    images: ImagesConfig | None = None,
    **parts: Any,
) -> DiffusionBranchRecipe:
    """A recipe on the demo's images, or others; `sampling` is of the base, or of all models."""
    if isinstance(sampling, DiffusionSampling):
        sampling = DiffusionBranchSampling(base=sampling)
    return DiffusionBranchRecipe(
        name=name,
        images=images or emoji(),
        base=base,
        sampling=sampling,
        samples=SAMPLES,
        evaluation=EVALUATION,
        **parts,
    )


def in_latents(name: str, base: DiffusionTraining, *, guidance_scale: float) -> DiffusionBranchRecipe:
    """A recipe in the latents of row T1's VAE-GAN, which are made once."""
    autoencoder, sampling = vae_gan_autoencoder(), ANCESTRAL.replace(threshold="none", guidance_scale=guidance_scale)
    once = PrecomputeConfig(columns=("latents",), resolution=autoencoder.data.resolution, kept_resolution=16)
    return branch(name, base.replace(in_channels=4), sampling, autoencoder=autoencoder, precompute=once)


def restored(name: str, model: DiffusionTraining, sampling: DiffusionSampling | None = None) -> ImageToImageRecipe:
    """A recipe of restoring the demo's images."""
    restoration = RestorationConfig(samples=48, reference_samples=1024)
    chosen = RestorationSampling(model=sampling or RESTORED)
    return ImageToImageRecipe(name=name, images=emoji(), model=model, sampling=chosen, restoration=restoration)


def at_32(training: DiffusionTraining) -> DiffusionTraining:
    """What takes the same minutes at 32² as the 16² of `diffusion`."""
    return training.replace(
        resolution=32,
        attention_resolutions=(8,),
        global_batch_size=12,
        total_steps=1000,
        checkpoint_every=250,
        sample_every=500,
    )


def restoring() -> DiffusionTraining:
    """A U-Net at 32² that is given a degraded image."""
    return at_32(diffusion()).replace(conditions=(), degradation=DegradationConfig())


def sketching() -> DiffusionTraining:
    """Predicts x_0: flat colors after minutes, where v-prediction leaves grain that the solver does not cure."""
    return diffusion().replace(prediction_type="sample")


def diffusion() -> DiffusionTraining:
    """16² by class in minutes: v-prediction, min-SNR, cosine schedule."""
    return DiffusionTraining.of(
        resolution=16,
        model_channels=32,
        channel_mult=(1, 2, 4),
        attention_resolutions=(8, 4),
        total_steps=1320,
        global_batch_size=24,  # in the same minutes better than 600 steps of 64: distance 77 in place of 85
        learning_rate=1e-3,
        ema_decay=0.995,
        precision="bf16",
        checkpoint_every=330,
        sample_every=660,
    )
