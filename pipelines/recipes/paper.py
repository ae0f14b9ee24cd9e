"""Published systems at their size, as recipes that run: give them images and a cluster.

Here are those of the discrete branch; diffusion is in `paper_branches.py`.

cascade run --recipe imagenet_class_prior --set images.source='s3://bucket/imagenet/*.tar' --profile kuberay
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from components.configuration.conditions import TokenCondition
from components.configuration.sampling import TokenBranchSampling, TransformerSampling
from components.configuration.trainings import PriorTraining
from components.stages.evaluate import EvaluationConfig
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, ImageToImageRecipe
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
from pipelines.recipes.shapes import OneModelRecipe, TokenBranchRecipe

PaperRecipe = Callable[[], OneModelRecipe | TokenBranchRecipe | DiffusionBranchRecipe | ImageToImageRecipe]


class PaperPrior(NamedTuple):
    """A row of the table: a transformer over the tokens of an autoencoder."""

    summary: str
    tokenizer: str  # in the table of published autoencoders
    model_dim: int
    num_heads: int
    num_layers: int
    condition: TokenCondition
    text_loss_weight: float
    total_steps: int
    global_batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    sampling: TransformerSampling
    vocab_size: int
    text_length: int
    changes: Mapping[str, Any] = MappingProxyType({})  # of what the others leave at its default


# fmt: off
PRIORS: dict[str, PaperPrior] = {
    # tokenizer, width, heads, layers, condition, weight of its text's loss, steps, batch, rate, betas, decay,
    # sampling, vocabulary, text length

    # Esser et al. (2021), table 4 ("cin256"): 48 layers, 24 heads, width 1,536, AdamW (0.9, 0.95), weight decay 0.01;
    # learning rate 4.5e-6 for each image of the batch. Batch and steps are ours.
    "imagenet_class_prior": PaperPrior(
        "Class-conditional ImageNet of taming-transformers: 16² tokens of 16,384 codes, a transformer of 1.4 billion.",
        "vqgan_imagenet_f16_16384", 1536, 24, 48, "label", 0.0, 1_000_000, 64, 64 * 4.5e-6, (0.9, 0.95), 0.01,
        TransformerSampling(top_k=600, top_p=0.92), 1024, 16),
    # kakaobrain/minDALL-E, `configs/dalle_1.3B.yaml`: 42 layers, 24 heads, width 1,536, text vocabulary 16,384;
    # DALL-E's weights of the two likelihoods, 1/8 and 7/8 (Ramesh et al., 2021). Batch, rate and steps are ours.
    "mindalle_text_prior": PaperPrior(
        "minDALL-E: 64 text and 16² image tokens in one transformer of 1.3 billion, over a VQ-GAN of 16,384 codes.",
        "vqgan_imagenet_f16_16384", 1536, 24, 42, "text", 1 / 8, 500_000, 512, 4.5e-4, (0.9, 0.96), 0.045,
        TransformerSampling(top_k=256), 16_384, 64),
    # Ramesh et al. (2021), section 2.2 and appendix B: 64 layers, 62 heads of 64, 256 text tokens of 16,384 words, row
    # and column positions, dropout 0.1; 430,000 updates of 1,024 pairs, AdamW (0.9, 0.96), weight decay 0.045, rate
    # 4.5e-4 after 5,000 updates, norms clipped at 4, an average of 0.999, temperature 1. Published, the rate is halved
    # five times where the loss stands still: ours falls along a line to the same 1/32. Attention is sparse there (a
    # row, a column or a window) and whole here, so weights are as many and operations more; a pad of a text has a
    # vector for each place there, and is not looked at here.
    "dalle_text_prior": PaperPrior(
        "DALL-E: 256 text and 32² image tokens in one transformer of 12 billion, over its dVAE of 8,192 codes; no GPU "
        "holds its 246 GB, so a profile needs `stages: {prior: {sharding: full}}`.",
        "dalle_dvae_f8_8192", 3968, 62, 64, "text", 1 / 8, 430_000, 1024, 4.5e-4, (0.9, 0.96), 0.045,
        TransformerSampling(), 16_384, 256,
        {"positions": "learned_2d", "dropout": 0.1, "warmup_steps": 5000, "max_grad_norm": 4.0,
         "final_lr_fraction": 1 / 32, "sample_every": 5000, "gradient_checkpointing": True}),
}
# fmt: on


def paper_recipes() -> dict[str, PaperRecipe]:
    """Name -> recipe, described by its `__doc__` as other recipes are."""
    recipes: dict[str, PaperRecipe] = {}
    for table, make in ((AUTOENCODERS, lone_model), (PRIORS, token_branch), (PAPER_BRANCHES, diffusion_branch)):
        for name, row in table.items():
            recipes[name] = partial(make, name, row)
            recipes[name].__doc__ = row.summary
    return recipes | {"palette_256": palette_256}


def lone_model(name: str, row: PaperAutoencoder) -> OneModelRecipe:
    """The recipe of an autoencoder by itself."""
    return OneModelRecipe(
        name=name,
        images=images(resolution=256),
        model=row.training,
        evaluation=EvaluationConfig(),
    )


def token_branch(name: str, row: PaperPrior) -> TokenBranchRecipe:
    """The recipe of a prior and its tokenizer, on images of the user's own."""
    prior = PriorTraining.of(
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        num_heads=row.num_heads,
        conditions=(row.condition,),
        text_loss_weight=row.text_loss_weight,
        total_steps=row.total_steps,
        global_batch_size=row.global_batch_size,
        learning_rate=row.learning_rate,
        betas=row.betas,
        weight_decay=row.weight_decay,
        precision="bf16",
        compile_network=True,
        checkpoint_minutes=CHECKPOINT_MINUTES,
        **row.changes,
    )
    return TokenBranchRecipe(
        name=name,
        images=images(resolution=256, vocab_size=row.vocab_size, text_length=row.text_length),
        tokenizer=AUTOENCODERS[row.tokenizer].training,
        prior=prior,
        sampling=TokenBranchSampling(prior=row.sampling.replace(compile_decoding=True)),
        samples=PUBLISHED_SAMPLES,
        evaluation=PUBLISHED_EVALUATION,
    )
