"""The published transformers have about the number of parameters that their papers round to.

Their tables differ from ours (classes in a table of their own, no bias at the head): the counts agree to their digits.
"""

import pytest
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.models.transformer import Transformer
from components.training.building import make_network
from components.training.learner import without_memory
from pipelines.recipes.published import PRIORS, token_branch


def built(name: str, *, classes: int) -> Transformer:
    recipe = token_branch(name, PRIORS[name])
    text = recipe.images
    dataset_info = DatasetInfo(num_classes=classes, vocab_size=text.vocab_size, text_length=text.text_length)
    with without_memory():
        return make_network(recipe.prior, dataset_info, recipe.tokenizer.token_grid)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "billions", "digits", "classes"),
    [
        ("imagenet_class_prior", 1.4, 1, 1000),
        ("mindalle_text_prior", 1.3, 1, 1),
        ("dalle_text_prior", 12, 0, 1),
    ],
)
def test_a_published_prior_has_its_published_size(name: str, billions: float, digits: int, classes: int):
    assert round(count(built(name, classes=classes)) / 1e9, digits) == billions


def test_dalle_s_prior_has_the_sequence_and_the_heads_of_its_paper():
    """64 layers of 62 heads of 64; 256 text tokens of 16,384 words, then 32² of 8,192 codes."""
    network = built("dalle_text_prior", classes=1)
    assert (len(network.blocks), network.num_heads, network.head.in_features // network.num_heads) == (64, 62, 64)
    assert (network.text_length, network.text_embedding.num_embeddings) == (256, 16_384)
    assert (network.grid, network.codebook_size) == ((32, 32), 8192)
    matrices = sum(parameter.numel() for parameter in network.blocks.parameters() if parameter.ndim == 2)
    assert matrices == 64 * 12 * 3968**2
