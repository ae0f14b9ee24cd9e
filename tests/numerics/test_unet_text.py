"""Laws of attention to tokens of texts and images in the U-Net."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import Context
from components.models.unet import UNet
from components.models.unet_blocks import TextAttention2d, placed, rotations
from tests.peer_unets import copy_weights, randomized

SMALL = {"resolution": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (4,), "num_heads": 2}
TEXT = {"vocab_size": 20, "context_length": 8, "model_dim": 16, "num_layers": 1, "num_heads": 2}
SEEN = ("cross_attention", "spatial_transformer")
GENERATOR = torch.Generator().manual_seed(1)
X_T, TIME = torch.randn(3, 3, 8, 8, generator=GENERATOR), torch.tensor([2, 500, 900])
STATES = torch.randn(3, 5, 12, generator=GENERATOR)
IDS = torch.cat([torch.randint(4, 20, (3, 5), generator=GENERATOR), torch.zeros(3, 2).long()], dim=1)


def network_of(text_conditioning: str, **changes) -> nn.Module:
    return randomized(UNet(**SMALL, text_conditioning=text_conditioning, **changes))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_the_network_of_latent_diffusion_equals_that_of_diffusers_under_a_map_of_weights(scale_shift_norm, depth):
    settings = {"resolution": 8, "model_channels": 128, "channel_mult": (1, 1, 2), "num_res_blocks": 1}
    settings |= {"attention_resolutions": (4,), "num_heads": 4, "text_conditioning": "spatial_transformer"}
    settings |= {"transformer_depth": depth, "text_states_dim": 24, "in_channels": 4, "out_channels": 4}
    network = UNet(**settings, scale_shift_norm=scale_shift_norm, resample_in_blocks=False).eval()
    peer = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(128, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, by a name that stayed
        cross_attention_dim=24,
        transformer_layers_per_block=depth,
        resnet_time_scale_shift="scale_shift" if scale_shift_norm else "default",
    )
    copy_weights(network, randomized(peer))
    network, peer = network.double(), peer.double()
    x_t, time, states = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 977]), torch.randn(2, 7, 24).double()
    with torch.no_grad():
        ours, theirs = network(x_t, time, text_states=states), peer(x_t, time, encoder_hidden_states=states).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


def test_attention_of_glide_is_one_softmax_over_tokens_and_positions():
    """Nichol et al. (2022): text keys and values are put before those of the image; a hidden token has weight 0."""
    layer = randomized(TextAttention2d(16, num_heads=2, context_dim=12)).double()
    x, states = torch.randn(2, 16, 3, 4).double(), torch.randn(2, 5, 12).double()
    visible = torch.tensor([[True] * 5, [True, True, False, False, False]])
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (2, 12, 16) each
    text_k, text_v = layer.context_kv(states).chunk(2, dim=-1)
    k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = torch.einsum("bnd,bmd->bnm", q[..., head], k[..., head]) / 8**0.5
        weights[1, :, 2:5] = -torch.inf
        heads.append(weights.softmax(-1) @ v[..., head])
    wanted = x + layer.proj(rearrange(torch.cat(heads, dim=-1), "b (h w) c -> b c h w", h=3))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, Context(states, visible)), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("text_conditioning", ["pooled", *SEEN])
def test_a_text_reaches_the_prediction_of_its_own_sample_alone(text_conditioning):
    for network, name, value, other in (
        (network_of(text_conditioning, text=TEXT), "text", IDS, IDS.flip(0)),
        (network_of(text_conditioning, text_states_dim=12), "text_states", STATES, STATES.flip(0)),
    ):
        with torch.no_grad():
            changes = (network(X_T, TIME, **{name: value}) - network(X_T, TIME, **{name: other})).abs().amax((1, 2, 3))
            alone = network(X_T[:1], TIME[:1], **{name: value[:1]})
            torch.testing.assert_close(network(X_T, TIME, **{name: value})[:1], alone, atol=1e-5, rtol=1e-5)
        assert changes[1] == 0  # the text in the middle stayed
        assert (changes[[0, 2]] > 1e-3).all()


@pytest.mark.parametrize("text_conditioning", ["pooled", *SEEN])
def test_padding_changes_nothing(text_conditioning):
    own, outside = network_of(text_conditioning, text=TEXT), network_of(text_conditioning, text_states_dim=12)
    longer = torch.cat([STATES, torch.zeros(3, 4, 12)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(own(X_T, TIME, text=IDS[:, :5]), own(X_T, TIME, text=IDS), atol=1e-5, rtol=1e-5)
        short, padded = outside(X_T, TIME, text_states=STATES), outside(X_T, TIME, text_states=longer)
    torch.testing.assert_close(short, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text_conditioning", SEEN)
def test_a_text_without_any_state_gives_a_finite_prediction(text_conditioning):
    network = network_of(text_conditioning, text_states_dim=12)
    assert network(X_T, TIME, text_states=torch.zeros_like(STATES)).isfinite().all()


def test_the_order_of_tokens_outside_does_not_matter_to_a_set_of_them():
    network = network_of("cross_attention", text_states_dim=12)
    with torch.no_grad():
        forward, backward = (network(X_T, TIME, text_states=states) for states in (STATES, STATES.flip(1)))
    torch.testing.assert_close(forward, backward, atol=1e-5, rtol=1e-5)


def test_a_class_token_conditions_like_a_text_of_one_token():
    """Latent diffusion's class-conditional models: the label is no part of the embedding."""
    by_label = network_of("spatial_transformer", num_classes=5, class_token_dim=12)
    by_text = network_of("spatial_transformer", text_states_dim=12)
    weights = by_label.state_dict()
    table = weights.pop("class_embedding.weight")
    by_text.load_state_dict(weights)
    label = torch.tensor([0, 5, 2])
    with torch.no_grad():
        ours, wanted = by_label(X_T, TIME, label=label), by_text(X_T, TIME, text_states=table[label][:, None])
        other = by_label(X_T, TIME, label=label.flip(0))
    torch.testing.assert_close(ours, wanted)
    assert (ours - other).abs().amax((1, 2, 3))[0] > 1e-3


def test_a_class_token_stands_beside_the_tokens_of_a_text():
    network = network_of("spatial_transformer", num_classes=5, class_token_dim=12, text_states_dim=12)
    conditions: dict[str, Tensor] = {"label": torch.tensor([0, 5, 2]), "text_states": STATES}
    with torch.no_grad():
        whole = network(X_T, TIME, **conditions)
        for name in conditions:
            change = whole - network(X_T, TIME, **(conditions | {name: conditions[name].flip(0)}))
            assert change.abs().amax((1, 2, 3))[0] > 1e-3


def test_the_embedding_of_a_spatial_transformer_knows_no_text():
    assert network_of("spatial_transformer", text_states_dim=12).text_projection is None
    assert network_of("cross_attention", text_states_dim=12).text_projection is not None


SIZES = {"resolution": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "head_dim": 8}
SIZES |= {"attention_resolutions": (4,), "condition_image_channels": 3, "image_token_dim": 12, "image_patch_size": 2}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    condition = torch.randn(2, 3, 8, 8, generator=generator)
    return {"x_t": image, "time": torch.tensor([3, 700]), "condition_image": condition}


@pytest.mark.parametrize("style", SEEN)
def test_the_image_is_a_set_of_patches_and_their_positions(style: str) -> None:
    """Concatenated, it would matter where a patch lies without any position."""
    network = randomized(UNet(**SIZES, text_conditioning=style))
    assert network.conv_in.in_channels == 3
    given = inputs()
    patches = rearrange(given["condition_image"], "b c (h p) (w q) -> b c h w p q", p=2, q=2).flip(2, 3)  # in reverse
    moved = given | {"condition_image": rearrange(patches, "b c h w p q -> b c (h p) (w q)")}
    with torch.no_grad():
        assert (network(**given) - network(**moved)).abs().amax((1, 2, 3)).min() > 1e-3
        network.image_tokens.grid = 0  # nowhere
        torch.testing.assert_close(network(**given), network(**moved), atol=1e-4, rtol=1e-4)
        other = given | {"condition_image": torch.zeros_like(given["condition_image"])}
        assert (network(**given) - network(**other)).abs().amax((1, 2, 3)).min() > 1e-3
    with_text = randomized(UNet(**SIZES, text_conditioning=style, text=TEXT | {"model_dim": 12}))
    given |= {"text": torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])}
    with torch.no_grad():
        for name in ("text", "condition_image"):
            change = with_text(**given) - with_text(**(given | {name: given[name].flip(0)}))
            assert change.abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_patch_lies_in_the_middle_of_its_positions(side: int) -> None:
    context = Context(torch.zeros(1, 3 + 4, 12), torch.ones(1, 7, dtype=torch.bool), grid=2)
    here, there = rotations(context, positions=side * side, head_dim=8)
    assert torch.equal(there[:3], torch.tensor([1.0, 0.0]).expand(3, 4, 2))
    angles, patches = (torch.atan2(*turned.flip(-1).unbind(-1)) for turned in (here, there[3:]))
    covered = rearrange(angles, "(h p w q) d -> (h w) (p q) d", h=2, w=2, p=side // 2).mean(1)
    torch.testing.assert_close(covered, patches, atol=1e-6, rtol=0)
    assert len(patches.unique(dim=0)) == 4


@pytest.mark.parametrize("own", [0, 16])
def test_a_text_lies_nowhere_and_at_the_first_patch_in_models_of_before(own: int) -> None:
    """Equal queries see a text alike from all places; patches, and the image's own positions, by their distance."""
    states, visible = torch.zeros(1, 3 + 4, 12), torch.ones(1, 7, dtype=torch.bool)
    q, k = torch.randn(1, 2, 1, 8).expand(-1, -1, 16, -1), torch.randn(1, 2, 7 + own, 8)
    before, now = (
        q @ k.mT / q.shape[3] ** 0.5
        for q, k in (placed(q, k, Context(states, visible, grid=2, nowhere=nowhere)) for nowhere in (False, True))
    )
    torch.testing.assert_close(now[..., :3], now[:, :, :1, :3].expand_as(now[..., :3]))
    assert (before[..., :3] - before[:, :, :1, :3]).abs().amax((0, 1, 3))[1:].min() > 1e-3
    torch.testing.assert_close(now[..., 3:], before[..., 3:])
    assert (now[..., 3:] - now[:, :, :1, 3:]).abs().amax((0, 1, 3))[1:].min() > 1e-3


@pytest.mark.parametrize("style", SEEN)
def test_a_network_of_before_is_rebuilt_by_its_arguments(style: str) -> None:
    """Without a text there is no difference."""
    for text in (None, TEXT | {"model_dim": 12}):
        before, now = (
            randomized(UNet(**SIZES, text_conditioning=style, text=text, **changes))
            for changes in ({}, {"others_nowhere": True})
        )
        given = inputs() | ({} if text is None else {"text": torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])})
        with torch.no_grad():
            assert torch.equal(before(**given), now(**given)) == (text is None)


WITH_IMAGE = SIZES | {"text_conditioning": "spatial_transformer"}


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (SMALL, {"text_conditioning": "cross_attention"}, "needs text"),
        (SMALL, {"text_conditioning": "spatial_transformer", "num_classes": 5}, "needs text"),
        (SMALL, {"num_classes": 5, "class_token_dim": 12}, "does not see class tokens"),
        (SMALL, {"class_token_dim": 12, "text_conditioning": "spatial_transformer"}, "needs num_classes"),
        (SMALL, {"text": TEXT, "text_states_dim": 12}, "either text or text_states_dim"),
        (
            SMALL | {"text_conditioning": "spatial_transformer"},
            {"text": TEXT, "num_classes": 5, "class_token_dim": 12},
            "must have one size, not text 16",
        ),
        (WITH_IMAGE, {"image_patch_size": 3}, "resolution 8 is not a multiple of image_patch_size 3"),
        (WITH_IMAGE, {"head_dim": 2}, "heads of 2 channels cannot see tokens of an image: they need a multiple of 4"),
        (WITH_IMAGE, {"condition_image_channels": 0}, "need condition_image_channels"),
        (WITH_IMAGE, {"text_conditioning": "pooled"}, "pooled does not see tokens of an image"),
        (WITH_IMAGE, {"class_token_dim": 8, "num_classes": 2}, "class_token_dim 8, image_token_dim 12"),
    ],
)
def test_attention_to_tokens_that_are_not_there_or_do_not_fit_is_refused(sizes: dict, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        UNet(**(sizes | changes))
