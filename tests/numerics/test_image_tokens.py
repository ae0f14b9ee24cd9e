"""Laws of a condition image that attention sees as tokens."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from components.models.conditioned import Context
from components.models.cross_attention import rotations
from components.models.unet import UNet
from tests.peer_unets import randomized

SIZES = {"resolution": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "head_dim": 8}
SIZES |= {"attention_resolutions": (4,), "condition_image_channels": 3, "image_token_dim": 12, "image_patch_size": 2}
STYLES = ["cross_attention", "spatial_transformer"]


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    condition = torch.randn(2, 3, 8, 8, generator=generator)
    return {"x_t": image, "time": torch.tensor([3, 700]), "condition_image": condition}


def reversed_patches(image: Tensor, size: int) -> Tensor:
    """The same patches in the opposite order, each as it was."""
    patches = rearrange(image, "b c (h p) (w q) -> b c h w p q", p=size, q=size).flip(2, 3)
    return rearrange(patches, "b c h w p q -> b c (h p) (w q)")


@pytest.mark.parametrize("style", STYLES)
def test_the_image_is_a_set_of_patches_and_their_positions(style: str) -> None:
    """Concatenated, it would matter where a patch lies without any position."""
    network = randomized(UNet(**SIZES, text_conditioning=style)).eval()
    given = inputs()
    moved = given | {"condition_image": reversed_patches(given["condition_image"], 2)}
    with torch.no_grad():
        assert (network(**given) - network(**moved)).abs().amax((1, 2, 3)).min() > 1e-3
        network.image_tokens.grid = 0  # nowhere
        torch.testing.assert_close(network(**given), network(**moved), atol=1e-4, rtol=1e-4)
        other = given | {"condition_image": torch.zeros_like(given["condition_image"])}
        assert (network(**given) - network(**other)).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_patch_lies_in_the_middle_of_its_positions_and_a_text_nowhere(side: int) -> None:
    """Their angles are the mean of those of the positions that it covers, in both directions."""
    context = Context(torch.zeros(1, 3 + 4, 12), torch.ones(1, 7, dtype=torch.bool), grid=2)
    here, there = rotations(context, positions=side * side, head_dim=8)
    assert torch.equal(there[:3], torch.tensor([1.0, 0.0]).expand(3, 4, 2))
    angles, patches = (torch.atan2(*turned.flip(-1).unbind(-1)) for turned in (here, there[3:]))
    covered = rearrange(angles, "(h p w q) d -> (h w) (p q) d", h=2, w=2, p=side // 2).mean(1)
    torch.testing.assert_close(covered, patches, atol=1e-6, rtol=0)
    assert len(patches.unique(dim=0)) == 4


def test_what_is_denoised_keeps_its_channels() -> None:
    assert UNet(**SIZES, text_conditioning="cross_attention").conv_in.in_channels == 3


def test_a_text_of_the_same_size_stands_beside_the_image() -> None:
    text = {"vocab_size": 20, "context_length": 8, "model_dim": 12, "num_layers": 1, "num_heads": 2}
    network = randomized(UNet(**SIZES, text_conditioning="cross_attention", text=text)).eval()
    given = inputs() | {"text": torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])}
    with torch.no_grad():
        before = network(**given)
        for name, value in {"text": given["text"].flip(0), "condition_image": -given["condition_image"]}.items():
            assert (before - network(**(given | {name: value}))).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_patch_size": 3}, "resolution 8 is not a multiple of image_patch_size 3"),
        ({"head_dim": 2}, "heads of 2 channels cannot see tokens of an image: they need a multiple of 4"),
        ({"condition_image_channels": 0}, "need condition_image_channels"),
        ({"text_conditioning": "pooled"}, "pooled does not see tokens of an image"),
        ({"class_token_dim": 8, "num_classes": 2}, "class_token_dim 8, image_token_dim 12"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet(**(SIZES | {"text_conditioning": "spatial_transformer"} | changes))
