"""Types of what networks give under autocast, on the meta device, which stands for a GPU, and on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from components.models.autoencoder import BOTTLENECKS
from components.models.bottleneck import nearest_codes
from components.models.bundle import NETWORKS
from components.models.critics import PatchDiscriminator
from components.models.devices import autocast, products, state_products
from components.models.gan import ProjectionDiscriminator

SIZE, CODES, LENGTH = 16, 8, 5
TEXT = {"vocab_size": 9, "context_length": LENGTH, "model_dim": 16, "num_layers": 1, "num_heads": 2}
UNET = {"resolution": SIZE, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "head_dim": 8}
AUTOENCODER = {"resolution": SIZE, "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4}
TOKENS = {"codebook_size": CODES, "num_tokens": 4, "model_dim": 16, "num_layers": 1, "num_heads": 2}
PIXELS = {"num_values": CODES, "num_channels": 3, "channels": 12, "num_layers": 1, "kernel_size": 3}
GAN: dict[str, Any] = {"resolution": SIZE, "channels": 8, "channel_mult": (1, 2), "num_classes": 3}
COARSE = {"channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 2}

BUILT: dict[str, dict[str, Any]] = {
    "autoencoder": AUTOENCODER | {"attention_resolutions": (), "bottleneck": {"kind": "gaussian"}},
    "transformer": TOKENS | {"vocab_size": 9, "text_length": LENGTH, "predict_text": True},
    "masked_transformer": TOKENS,
    "pixelcnn": PIXELS,
    "row_lstm": PIXELS,
    "gan": GAN | {"noise_dim": 4},
    "unet": UNET | {"attention_resolutions": (8,), "text": TEXT, "num_classes": 3, "low_res": True},
    "image_attention_unet": UNET
    | {"attention_resolutions": (8,), "condition_image_channels": 3, "image_token_dim": 16}
    | {"text_conditioning": "spatial_transformer"},
    "dit": {"resolution": SIZE, "patch_size": 4, "model_dim": 16, "num_layers": 1, "num_heads": 2, "num_classes": 3},
    "classifier": UNET | {"attention_resolutions": (), "num_classes": 3},
    "contrastive": COARSE | {"resolution": SIZE, "embedding_dim": 4, "text": TEXT},
    "diffusion_prior": {"embedding_dim": 4, "text_length": LENGTH, "text_dim": 6, "model_dim": 16}
    | {"num_layers": 1, "num_heads": 2},
}


def image() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE)


def numbers(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


GIVEN: dict[str, Callable[[], dict[str, Tensor | bool]]] = {
    "autoencoder": lambda: {"image": image()},
    "transformer": lambda: {"tokens": numbers(2, 4), "text": numbers(2, LENGTH), "with_text": True},
    "masked_transformer": lambda: {"tokens": numbers(2, 4)},
    "pixelcnn": lambda: {"values": numbers(2, 3, 4, 4)},
    "row_lstm": lambda: {"values": numbers(2, 3, 4, 4)},
    "gan": lambda: {"noise": torch.rand(2, 4), "label": numbers(2)},
    "unet": lambda: (
        {"x_t": image(), "time": numbers(2), "label": numbers(2), "text": numbers(2, LENGTH)}
        | {"low_res": image(), "noise_level": numbers(2)}
    ),
    "image_attention_unet": lambda: {"x_t": image(), "time": numbers(2), "condition_image": image()},
    "dit": lambda: {"x_t": image(), "time": numbers(2), "label": numbers(2)},
    "classifier": lambda: {"x_t": image(), "time": numbers(2)},
    "contrastive": lambda: {"image": image(), "text": numbers(2, LENGTH)},
    "diffusion_prior": lambda: (
        {"x_t": torch.rand(2, 4), "time": numbers(2), "text_embedding": torch.rand(2, 4)}
        | {"text_states": torch.rand(2, LENGTH, 6)}
    ),
}
DEVICES = ("meta", "cpu")


def types(given: Any) -> set[torch.dtype]:
    """Types of all numbers in an output that are no indices."""
    found = tree_leaves(given)
    return {leaf.dtype for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_under_autocast_every_output_is_fp32(kind: str, device: str) -> None:
    with torch.device(device):
        network, given = NETWORKS[kind](**BUILT[kind]), GIVEN[kind]()
    seen = products_of(network)
    with torch.no_grad(), autocast(torch.device(device), enabled=True):
        assert types(network(**given)) == {torch.float32}
    assert torch.bfloat16 in seen, "nothing was rounded, so nothing is shown"


def products_of(network: nn.Module) -> set[torch.dtype]:
    """Types that layers of the network give once it runs."""
    found: set[torch.dtype] = set()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    return found


@pytest.mark.parametrize("kind", sorted(BOTTLENECKS))
def test_whatever_the_bottleneck_latents_and_pixels_are_fp32(kind: str) -> None:
    own = {"fsq": {"levels": (4, 4)}, "gaussian": {}}.get(kind, {"codebook_size": CODES})
    with torch.device("meta"):
        arguments = AUTOENCODER | {"attention_resolutions": (), "bottleneck": {"kind": kind, **own}}
        network, given = NETWORKS["autoencoder"](**arguments).eval(), image()
    with torch.no_grad(), autocast(torch.device("meta"), enabled=True):
        output, encoded = network(given)
    assert types((output, encoded.z, encoded.losses)) == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_discriminators_are_fp32(device: str) -> None:
    with torch.device(device):
        judges = PatchDiscriminator(channels=8, num_layers=2), ProjectionDiscriminator(**GAN)
        given, label = image(), numbers(2)
    with torch.no_grad(), autocast(torch.device(device), enabled=True):
        assert types([judges[0](given), judges[1](given, label)]) == {torch.float32}


def test_in_training_a_large_head_multiplies_in_bf16() -> None:
    with torch.device("meta"):
        network, given = NETWORKS["masked_transformer"](**BUILT["masked_transformer"]), numbers(2, 4)
    with autocast(torch.device("meta"), enabled=True):
        assert types(network(given)) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn", "row_lstm"])
def test_logits_that_are_drawn_from_are_fp32(kind: str) -> None:
    network: Any = NETWORKS[kind](**(TOKENS if kind == "transformer" else PIXELS))
    size = {} if kind == "transformer" else {"height": 2, "width": 2}
    with autocast(torch.device("cpu"), enabled=True):
        logits, cache = network.start(2, **size)
        assert types([logits, network.step(numbers(2), cache=cache)]) == {torch.float32}


@pytest.mark.parametrize("kind", ["unet", "dit", "classifier", "diffusion_prior"])
def test_embeddings_of_times_are_those_of_fp32(kind: str) -> None:
    """In bf16 the cosines of 998 and 999 times a small frequency are one number."""
    network: Any = NETWORKS[kind](**BUILT[kind])
    found: list[Tensor] = []
    network.time_mlp.register_forward_hook(lambda module, inputs, output: found.append(output))
    for enabled in (False, True):
        with torch.no_grad(), autocast(torch.device("cpu"), enabled=enabled):
            network(**GIVEN[kind]())
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "end"), [("unet", "embedding_projection"), ("contrastive", "_projection")])
def test_embeddings_are_projected_in_fp32(kind: str, end: str) -> None:
    network, found = NETWORKS[kind](**BUILT[kind]), list[Tensor]()
    for name, module in network.named_modules():
        if name.endswith(end):
            module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad(), autocast(torch.device("cpu"), enabled=True):
        network(**GIVEN[kind]())
    assert types(found) == {torch.float32}


def test_distances_to_codes_know_no_tf32_and_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, addmm = [], torch.addmm

    def seen(*args: Any, **options: Any) -> Tensor:
        flags.append(torch.backends.cuda.matmul.allow_tf32)
        return addmm(*args, **options)

    monkeypatch.setattr(torch, "addmm", seen)
    with products("tf32"):
        nearest_codes(torch.rand(3, 4), torch.rand(5, 4))
        assert torch.backends.cuda.matmul.allow_tf32
    assert flags == [False]


def test_sums_of_bf16_products_are_never_bf16() -> None:
    matrices = torch.backends.cuda.matmul
    before = matrices.allow_bf16_reduced_precision_reduction
    with products("bf16"):
        assert not matrices.allow_bf16_reduced_precision_reduction
    assert matrices.allow_bf16_reduced_precision_reduction == before
    state_products("fp32")
    assert not matrices.allow_bf16_reduced_precision_reduction
