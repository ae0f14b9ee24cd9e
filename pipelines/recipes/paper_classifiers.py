"""ADM's classifiers of noisy images at their published size, for guidance by their gradient.

Dhariwal and Nichol (2021), appendix H, and the flags of openai/guided-diffusion, which are those of 128²: 300,000 steps
of 256 images, rate 3e-4 down to nothing, weight decay 0.05, random crops. The others take the same here; that crops
are shifts by at most an eighth of the side is ours.
"""

from collections.abc import Callable
from typing import Any

from components.configuration.trainings import ClassifierTraining
from pipelines.recipes.paper_diffusion import ADM_64, ADM_128, ADM_256, ADM_512, LOGGED, NORM_GROUPS


def adm_classifier_64() -> ClassifierTraining:
    """ADM's classifier of noisy images, 64², twice as deep as the others; on the cosine schedule of its model."""
    return _classifier(64, channel_mult=ADM_64, num_res_blocks=4, schedule="cosine")


def adm_classifier_128() -> ClassifierTraining:
    """ADM's classifier of noisy images, 128²."""
    return _classifier(128, channel_mult=ADM_128)


def adm_classifier_256() -> ClassifierTraining:
    """ADM's classifier of noisy images, 256²."""
    return _classifier(256, channel_mult=ADM_256)


def adm_classifier_512() -> ClassifierTraining:
    """ADM's classifier of noisy images, 512²."""
    return _classifier(512, channel_mult=ADM_512)


PAPER_CLASSIFIERS: tuple[Callable[[], ClassifierTraining], ...] = (
    adm_classifier_64,
    adm_classifier_128,
    adm_classifier_256,
    adm_classifier_512,
)


def _classifier(resolution: int, **numbers: Any) -> ClassifierTraining:
    shared: dict[str, Any] = {
        "model_channels": 128,
        "num_res_blocks": 2,
        "attention_resolutions": (32, 16, 8),
        "head_dim": 64,
        "norm_groups": NORM_GROUPS,
        "schedule": "linear",
        "total_steps": 300_000,
        "global_batch_size": 256,
        "learning_rate": 3e-4,
        "final_lr_fraction": 0.0,
        "warmup_steps": 0,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
        "ema_decay": 0.0,
        "max_shift": resolution // 8,
        "mirror": True,
    }
    return ClassifierTraining.of(resolution=resolution, **(shared | LOGGED | numbers))
