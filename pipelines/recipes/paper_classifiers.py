"""ADM's classifiers of noisy images at their published size, for guidance by their gradient.

Dhariwal and Nichol (2021), appendix H, and the flags of openai/guided-diffusion, which are those of 128²: 300,000 steps
of 256 images, rate 3e-4 down to nothing, weight decay 0.05, random crops. The others take the same here; that crops
are shifts by at most an eighth of the side is ours.
"""

from typing import Literal

from components.configuration.networks import ClassifierNetworkConfig
from components.configuration.optimization import ClassifierOptimization
from components.configuration.processes import DiscreteNoise
from components.configuration.trainings import AugmentedData, ClassifierTraining
from pipelines.recipes.paper_diffusion import ADM_64, ADM_128, ADM_256, ADM_512, INTERVALS, NORM_GROUPS


def classifier(
    resolution: int,  # pixels
    channel_mult: tuple[int | float, ...],
    num_res_blocks: int,
    schedule: Literal["linear", "cosine"],
) -> ClassifierTraining:
    """A row of the table, with what all have."""
    network = ClassifierNetworkConfig(
        model_channels=128,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        norm_groups=NORM_GROUPS,
    )
    optimization = ClassifierOptimization(
        total_steps=300_000,
        global_batch_size=256,
        learning_rate=3e-4,
        final_lr_fraction=0.0,
        warmup_steps=0,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        ema_decay=0.0,
        precision="bf16",
        compile_network=True,
        **INTERVALS,
    )
    return ClassifierTraining(
        network=network,
        process=DiscreteNoise(schedule=schedule),
        data=AugmentedData(resolution=resolution, max_shift=resolution // 8, mirror=True),
        optimization=optimization,
    )


PAPER_CLASSIFIERS: dict[str, ClassifierTraining] = {
    # side, levels, blocks, schedule of its model
    "adm_classifier_64": classifier(64, ADM_64, 4, "cosine"),  # twice as deep as the others
    "adm_classifier_128": classifier(128, ADM_128, 2, "linear"),
    "adm_classifier_256": classifier(256, ADM_256, 2, "linear"),
    "adm_classifier_512": classifier(512, ADM_512, 2, "linear"),
}
