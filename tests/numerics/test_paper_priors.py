"""The published transformers have about the number of parameters that their papers round to.

Their tables differ from ours (classes in a table of their own, no bias at the head): the counts agree to their digits.
"""

import pytest
import torch

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.models.transformer import Transformer
from components.training.building import network_arguments
from pipelines.recipes.paper import PRIORS, token_branch


@pytest.mark.parametrize(
    ("name", "billions", "classes"), [("imagenet_class_prior", 1.4, 1000), ("mindalle_text_prior", 1.3, 1)]
)
def test_a_published_prior_has_its_published_size(name: str, billions: float, classes: int):
    built = token_branch(name, PRIORS[name])
    text = built.images
    dataset_info = DatasetInfo(num_classes=classes, vocab_size=text.vocab_size, text_length=text.text_length)
    grid = TokenGrid(codebook_size=16_384, height=16, width=16)
    with torch.device("meta"):
        network = Transformer(**network_arguments(built.prior, dataset_info, grid))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e9, 1) == billions
