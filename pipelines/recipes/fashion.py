"""Fashion-MNIST at its own 28², each training minutes on two cores: likelihoods of its one channel, samplers by steps,
guidance by scale.

Likelihoods are of the same held-out images, none conditioned on a class: a PixelCNN's are exact, those of diffusion are
bounds, and the PNGs of the images stand beside.
"""

from collections.abc import Callable
from typing import Any

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import DiffusionBranchSampling, DiffusionSampling
from components.configuration.trainings import ClassifierTraining
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.models.diffusion.steps import SAMPLERS
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.diffusion_shapes import DiffusionStudiesRecipe
from pipelines.recipes.discrete_rows import pixels
from pipelines.recipes.shapes import OneModelRecipe

REFERENCE = 5000  # training images that distances are measured to
SAMPLES = SamplesConfig(measured_samples=256, images_per_class=8, num_prompts=0)
EVALUATION = EvaluationConfig(reference_samples=REFERENCE)
LEARNED_VARIANCE = DiffusionSampling(sampler="ddpm", num_inference_steps=250)  # ancestral steps alone have a variance


def fashion_steps() -> DiffusionStudiesRecipe:
    """D4: fewer steps, Fréchet distance of every sampler at 5 to 50 steps and of 250 ancestral ones."""
    return studies(
        "fashion_steps",
        base=unet_by_class(),
        steps_study=StepsStudyConfig(samplers=tuple(SAMPLERS), reference_samples=REFERENCE),
    )


def fashion_guidance() -> DiffusionStudiesRecipe:
    """D6: guidance by a classifier, by leaving the class out everywhere or in an interval, and by a weaker model."""
    return studies(
        "fashion_guidance",
        base=unet_by_class(),
        weaker=unet_by_class().replace(total_steps=300, checkpoint_every=300, sample_every=300),
        classifier=classifier(noisy=True),
        judge=classifier(noisy=False),
        guidance_study=GuidanceStudyConfig(
            methods=("classifier", "classifier_free", "interval", "autoguidance"),
            sampler="sde_dpm_solver_pp",
            num_inference_steps=15,
            samples=512,
            reference_samples=REFERENCE,
        ),
    )


def fashion_pixelcnn() -> OneModelRecipe:
    """P1: gated PixelCNN over gray pixels at 28², exact bits/dim."""
    return OneModelRecipe(
        name="fashion_pixelcnn",
        images=fashion(),
        model=pixels().replace(resolution=28, in_channels=1, conditions=(), channels=32, total_steps=600),
        samples=SAMPLES,
        evaluation=EVALUATION,
    )


def fashion_likelihood_ddpm() -> DiffusionStudiesRecipe:
    """D2: variational bound of DDPM, linear schedule, noise prediction, fixed large variance, in its three terms."""
    return likelihood("fashion_likelihood_ddpm", noise_net().replace(schedule="linear", variance="fixed_large"))


def fashion_likelihood_bound() -> DiffusionStudiesRecipe:
    """D2: the same model trained on the bound itself, the objective of 2015."""
    base = noise_net().replace(schedule="linear", variance="fixed_large", loss="vlb")
    return likelihood("fashion_likelihood_bound", base)


def fashion_likelihood_hybrid() -> DiffusionStudiesRecipe:
    """D3: variational bound of Improved DDPM, cosine schedule, learned variance, hybrid loss, in its three terms."""
    base = noise_net().replace(variance="learned_range", loss="hybrid")
    return likelihood("fashion_likelihood_hybrid", base, LEARNED_VARIANCE)


def fashion_likelihood_loss_aware() -> DiffusionStudiesRecipe:
    """D3: Improved DDPM trained on the bound itself, its timesteps drawn by their losses from step 490 on."""
    base = noise_net().replace(
        variance="learned_range",
        loss="vlb",
        timestep_sampling="loss_aware",
        num_train_timesteps=500,  # of 1,000 some would be drawn less than ten times in half of the training
    )
    return likelihood("fashion_likelihood_loss_aware", base, LEARNED_VARIANCE)


FASHION: dict[Callable[[], DiffusionStudiesRecipe | OneModelRecipe], str] = {
    fashion_pixelcnn: "P1",
    fashion_likelihood_ddpm: "D2",
    fashion_likelihood_bound: "D2",
    fashion_likelihood_hybrid: "D3",
    fashion_likelihood_loss_aware: "D3",
    fashion_steps: "D4",
    fashion_guidance: "D6",
}


def fashion() -> ImagesConfig:
    """The images that all of them share."""
    return ImagesConfig(
        source="fashion_mnist",
        resolution=28,
        samples_per_shard=2000,
        holdout_fraction=0.05,
        vocab_size=300,
        text_length=8,
    )


def studies(name: str, **parts: Any) -> DiffusionStudiesRecipe:
    """A recipe of studies on these images."""
    return DiffusionStudiesRecipe(name=name, images=fashion(), samples=SAMPLES, evaluation=EVALUATION, **parts)


def likelihood(name: str, base: DiffusionTraining, sampling: DiffusionSampling | None = None) -> DiffusionStudiesRecipe:
    """A recipe of a model's bound."""
    return studies(
        name,
        base=base,
        sampling=DiffusionBranchSampling(base=sampling or DiffusionSampling()),
        likelihood=LikelihoodConfig(samples=256, timesteps_per_image=125),  # all 1,000: eight times the minutes
    )


def noise_net() -> DiffusionTraining:
    """One gray channel and no class; predicts noise, as the likelihoods of 2020 and 2021 were measured."""
    return unet().replace(
        conditions=(),
        in_channels=1,
        schedule="cosine",
        prediction_type="epsilon",
        min_snr_gamma=None,
        total_steps=1200,
        sample_every=600,
    )


def unet_by_class() -> DiffusionTraining:
    """What both studies sample from; x_0 predicted has half the distance of v-prediction after 15 steps."""
    return unet().replace(prediction_type="sample", total_steps=2300, checkpoint_every=575, sample_every=1150)


def unet() -> DiffusionTraining:
    """28² in three levels, by class."""
    return DiffusionTraining.of(
        resolution=28,
        model_channels=16,  # twice as many cost twice the time, in training and in each of the studies' evaluations
        channel_mult=(1, 2, 4),  # 28 -> 7
        num_res_blocks=1,
        attention_resolutions=(7,),
        total_steps=1600,
        global_batch_size=24,
        learning_rate=1.5e-3,
        ema_decay=0.995,
        precision="bf16",
        checkpoint_every=400,
        sample_every=800,
    )


def classifier(*, noisy: bool) -> ClassifierTraining:
    """28² to ten classes."""
    return ClassifierTraining.of(
        resolution=28,
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(7,),
        noisy=noisy,
        total_steps=500,
        global_batch_size=64,
        learning_rate=1e-3,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=250,
        sample_every=500,
    )
