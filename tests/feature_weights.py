"""Feature networks of papers with random weights, in the structure of those that wrote them."""

import json
from pathlib import Path
from unittest import mock

import pytest
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


def open_clip_network(folder: Path, *, file: str, quick_gelu: bool) -> nn.Module:
    """A small CLIP of open_clip, written to the folder as to a hub, with the tokenizer of `clip_network`.
    Heads, depths, images' means and the activation differ from what a CLIPModel has by default."""
    open_clip = pytest.importorskip("open_clip")
    clip_network(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    vision = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16, "mlp_ratio": 2.5}
    text = {"context_length": 6, "vocab_size": 6, "width": 48, "heads": 3, "layers": 2}
    sizes = {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    alike = model.encode_image(torch.rand(1, 3, 32, 32)) @ model.encode_text(torch.tensor([[0, 3, 5, 1, 0, 0]])).T
    model.text_projection.data *= alike.detach().sign()  # scores below 0 are all 0
    stated = {"model_cfg": sizes, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25]}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save(tensors, folder / file) if file.endswith(".bin") else (folder / file).write_bytes(save(tensors))
    return model
