"""Feature networks of papers with random weights, in the structure of those that wrote them."""

from pathlib import Path
from unittest import mock

import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
import torch_fidelity.sample_similarity_lpips as lpips
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch_fidelity import FeatureExtractorDinoV2
from torchvision.models import vgg16
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model


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


def lpips_network(seed: int = 0) -> nn.Module:
    """torch-fidelity's own LPIPS with random weights: positive ones of its layers."""
    torch.manual_seed(seed)
    with (
        mock.patch.object(lpips, "load_state_dict_from_url"),
        mock.patch.object(lpips.SampleSimilarityLPIPS, "load_state_dict"),
        mock.patch.object(lpips, "torchvision_load_pretrained_vgg16", return_value=vgg16(weights=None)),
    ):
        network = lpips.SampleSimilarityLPIPS("theirs")
    for name, parameter in network.named_parameters():
        if name.startswith("lin"):
            parameter.uniform_()
    return network


def write_lpips(path: Path, network: nn.Module) -> Path:
    """The weights of `lpips_network` in one file, by the names of torchvision and of LPIPS."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        own = name if name.startswith("lin") else "features." + name.split(".", 2)[2]  # net.slice1.0.weight
        tensors[own] = tensor.contiguous()
    path.write_bytes(save(tensors))
    return path


class ClassToken(nn.Module):
    """A Dinov2Model as the first code of DINOv2 is called: the class token alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image).pooler_output


def dinov2_network(folder: Path, *, seed: int = 0) -> nn.Module:
    """torch-fidelity's extractor around a small Dinov2Model of random weights, which is written to the folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    with mock.patch.object(torch.hub, "load", return_value=ClassToken(model)):
        return FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])


def clip_network(folder: Path, *, seed: int = 0) -> CLIPModel:
    """A small CLIPModel of random weights for images of 16² and a few words, which is written to the folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"begin": 0, "end": 1, "a": 2, "red": 3, "blue": 4, "heart": 5}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
    vision = sizes | {"image_size": 16, "patch_size": 8, "initializer_range": 0.3}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="begin $A end", special_tokens=[("begin", 0), ("end", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
