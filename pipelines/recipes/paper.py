"""Published systems at their size, as recipes that run: give them images and a cluster.

Here are those of the discrete branch; diffusion is in `paper_branches.py`.

cascade run --recipe imagenet_class_prior --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from components.configuration.conditions import TokenCondition
from components.configuration.sampling import TokenBranchSampling, TokenSampling
from components.configuration.trainings import PriorTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.samples import SamplesConfig
from pipelines.diffusion_branch import DiffusionBranchRecipe
from pipelines.image_to_image import ImageToImageRecipe
from pipelines.one_model import OneModelRecipe
from pipelines.recipes.paper_autoencoders import AUTOENCODERS, PaperAutoencoder
from pipelines.recipes.paper_branches import (
    PAPER_BRANCHES,
    PUBLISHED_EVALUATION,
    PUBLISHED_SAMPLES,
    diffusion_branch,
    images,
    palette_256,
)
from pipelines.recipes.paper_diffusion import CHECKPOINT_MINUTES
from pipelines.token_branch import TokenBranchRecipe

PaperRecipe = Callable[[], OneModelRecipe | TokenBranchRecipe | DiffusionBranchRecipe | ImageToImageRecipe]


class PaperPrior(NamedTuple):
    """A row of the table: a transformer of width 1,536 in 24 heads over the tokens of VQ-GAN's 16,384 codes."""

    about: str
    num_layers: int
    condition: TokenCondition
    text_loss_weight: float
    total_steps: int
    global_batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    sampling: TokenSampling
    vocab_size: int
    text_length: int


# fmt: off
PRIORS: dict[str, PaperPrior] = {
    # layers, condition, weight of its text's loss, steps, batch, rate, betas, decay, sampling, vocabulary, text length

    # Esser et al. (2021), table 4 ("cin256"): 48 layers, 24 heads, width 1,536, AdamW (0.9, 0.95), weight decay 0.01;
    # learning rate 4.5e-6 for each image of the batch. Batch and steps are ours.
    "imagenet_class_prior": PaperPrior(
        "Class-conditional ImageNet of taming-transformers: 16² tokens of 16,384 codes, a transformer of 1.4 billion.",
        48, "label", 0.0, 1_000_000, 64, 64 * 4.5e-6, (0.9, 0.95), 0.01, TokenSampling(top_k=600, top_p=0.92),
        1024, 16),
    # kakaobrain/minDALL-E, `configs/dalle_1.3B.yaml`: 42 layers, 24 heads, width 1,536, text vocabulary 16,384;
    # DALL-E's weights of the two likelihoods, 1/8 and 7/8 (Ramesh et al., 2021). Batch, rate and steps are ours.
    "mindalle_text_prior": PaperPrior(
        "minDALL-E: 64 text and 16² image tokens in one transformer of 1.3 billion, over a VQ-GAN of 16,384 codes.",
        42, "text", 1 / 8, 500_000, 512, 4.5e-4, (0.9, 0.96), 0.045, TokenSampling(top_k=256),
        16_384, 64),
}
# fmt: on


def paper_recipes() -> dict[str, PaperRecipe]:
    """Name -> recipe, described by its `__doc__` as other recipes are."""
    recipes: dict[str, PaperRecipe] = {}
    for table, make in ((AUTOENCODERS, lone_model), (PRIORS, token_branch), (PAPER_BRANCHES, diffusion_branch)):
        for name, row in table.items():
            recipes[name] = partial(make, name, row)
            recipes[name].__doc__ = row.about
    return recipes | {"palette_256": palette_256}


def lone_model(name: str, row: PaperAutoencoder) -> OneModelRecipe:
    """The recipe of an autoencoder by itself."""
    return OneModelRecipe(
        name=name,
        images=images(resolution=256),
        model=row.training,
        samples=SamplesConfig(),
        evaluation=EvaluationConfig(),
    )


def token_branch(name: str, row: PaperPrior) -> TokenBranchRecipe:
    """The recipe of a prior and its tokenizer, on images of the user's own."""
    prior = PriorTraining.of(
        model_dim=1536,
        num_layers=row.num_layers,
        num_heads=24,
        conditions=(row.condition,),
        text_loss_weight=row.text_loss_weight,
        total_steps=row.total_steps,
        global_batch_size=row.global_batch_size,
        learning_rate=row.learning_rate,
        betas=row.betas,
        weight_decay=row.weight_decay,
        precision="bf16",
        checkpoint_minutes=CHECKPOINT_MINUTES,
    )
    return TokenBranchRecipe(
        name=name,
        images=images(resolution=256, vocab_size=row.vocab_size, text_length=row.text_length),
        tokenizer=AUTOENCODERS["vqgan_imagenet_f16_16384"].training,
        prior=prior,
        sampling=TokenBranchSampling(prior=row.sampling),
        samples=PUBLISHED_SAMPLES,
        evaluation=PUBLISHED_EVALUATION,
    )
