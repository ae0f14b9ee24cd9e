"""Feature networks of papers with random weights, in the structure of those that wrote them."""

from pathlib import Path
from unittest import mock

import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from torch import nn


def inception_network(path: Path | None = None, *layers: str) -> nn.Module:
    """torch-fidelity's own network, with its weights from a file or without."""
    if path is not None:
        return inception.FeatureExtractorInceptionV3("theirs", [*layers], feature_extractor_weights_path=path)
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        return inception.FeatureExtractorInceptionV3("theirs", ["2048"])


def write_inception(path: Path, *, seed: int = 0) -> Path:
    """Random weights whose features neither vanish nor grow, as torch saves them."""
    torch.manual_seed(seed)
    network = inception_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path
