"""Laws of the U-Net: published sizes, equality with diffusers, and what each condition may and may not do."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from components.models.layers import SelfAttention2d, recompute_blocks, timestep_embedding
from components.models.unet import UNet
from components.models.unet_blocks import TimedResBlock
from tests.peer_unets import SMALL_UNET, copy_weights, full_network, inputs, peer_unet, randomized


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@pytest.mark.parametrize("resample_in_blocks", [True, False])
def test_the_network_equals_that_of_diffusers_under_a_map_of_weights(scale_shift_norm, resample_in_blocks):
    """Time by addition and adaptive group norm, resampling in blocks and by convolutions; with a learned variance."""
    settings = {"resolution": 8, "model_channels": 128, "channel_mult": (1, 1, 2), "num_res_blocks": 1}
    settings |= {"attention_resolutions": (4,), "head_dim": 64, "num_classes": 9}
    settings |= {"resample_in_blocks": resample_in_blocks}
    network = UNet(**settings, scale_shift_norm=scale_shift_norm, learned_variance=True).eval()
    shift = "scale_shift" if scale_shift_norm else "default"
    del settings["num_classes"]
    about = {"num_class_embeds": 10, "out_channels": 6, "attn_norm_num_groups": 32, "resnet_time_scale_shift": shift}
    peer = randomized(peer_unet(**settings, **about))
    copy_weights(network, peer)
    network, peer = network.double(), peer.double()
    x_t, time, label = torch.randn(2, 3, 8, 8).double(), torch.tensor([3, 977]), torch.tensor([0, 9])
    with torch.no_grad():
        ours, theirs = network(x_t, time, label=label), peer(x_t, time, class_labels=label).sample
    assert theirs.std() > 0.1
    assert ours.shape == (2, 6, 8, 8)
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


def test_a_new_network_predicts_nothing_and_its_blocks_pass_their_input_on():
    network = full_network()
    assert network(**inputs()).abs().max() == 0
    block = TimedResBlock(16, 16, embedding_dim=64, dropout=0.0, scale_shift_norm=True)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 64)), x)


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_blocks_of_ddpm_plus_plus_equal_those_of_diffusers(resample):
    """Sums divided by sqrt(2), and a projected skip where maps are resampled: `ResnetBlock2D` and `Attention` there."""
    sizes = {"groups": 8, "eps": 1e-6, "output_scale_factor": math.sqrt(2), "time_embedding_norm": "default"}
    how = {"up": resample == "up", "down": resample == "down", "use_in_shortcut": resample is not None}
    peer = randomized(ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=64, **sizes, **how)).eval()
    shape = {"embedding_dim": 64, "dropout": 0.0, "scale_shift_norm": False, "eps": 1e-6, "resample": resample}
    block = TimedResBlock(32, 32, plus_plus=True, **shape)
    names = {"norm_1": "norm1", "conv_1": "conv1", "embedding_projection": "time_emb_proj", "norm_2": "norm2"}
    names |= {"conv_2": "conv2"} | ({"skip": "conv_shortcut"} if resample else {})
    for ours, theirs in names.items():
        getattr(block, ours).load_state_dict(getattr(peer, theirs).state_dict())
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 64)
    torch.testing.assert_close(block(x, F.silu(embedding)), peer(x, embedding), atol=1e-5, rtol=1e-5)

    heads = {"heads": 1, "dim_head": 32, "norm_num_groups": 8, "eps": 1e-6, "bias": True}
    other = randomized(Attention(32, residual_connection=True, rescale_output_factor=math.sqrt(2), **heads))
    attention = SelfAttention2d(32, num_heads=1, eps=1e-6, halves=True)
    projections = [other.to_q, other.to_k, other.to_v]
    attention.load_state_dict(
        {f"norm.{name}": tensor for name, tensor in other.group_norm.state_dict().items()}
        | {"qkv.weight": torch.cat([part.weight for part in projections])[..., None, None]}
        | {"qkv.bias": torch.cat([part.bias for part in projections])}
        | {"proj.weight": other.to_out[0].weight[..., None, None], "proj.bias": other.to_out[0].bias}
    )
    torch.testing.assert_close(attention(x), other(x), atol=1e-5, rtol=1e-5)


def test_ddpm_plus_plus_adds_the_label_to_the_frequencies_and_attends_once_a_level_on_the_way_up():
    network = randomized(UNet(**SMALL_UNET | {"num_classes": 3}, scale_shift_norm=False, plus_plus=True)).eval()
    width, rows = network.time_mlp[0].in_features, network.class_embedding.weight
    assert rows.shape == (4, width)
    frequencies = timestep_embedding(torch.tensor([5]), width)
    expected = network.time_mlp(frequencies + rows[1])
    torch.testing.assert_close(network.embed(torch.tensor([5]), {"label": torch.tensor([1])})[0], expected)
    attending = [any(isinstance(layer, SelfAttention2d) for layer in layers) for layers in network.up]
    blocks = SMALL_UNET["num_res_blocks"] + 1
    levels = [attending[start : start + blocks] for start in range(0, len(attending), blocks)]
    assert any(map(any, levels))
    assert not any(any(level[:-1]) for level in levels)
    assert network.conv_in.out_channels == SMALL_UNET["model_channels"]


KINDS = pytest.mark.parametrize("kind", ["unet", "dit"])


@KINDS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time", torch.tensor([0, 0, 0])),
        ("label", torch.tensor([5, 5, 5])),
        ("text", torch.tensor([[1, 2, 0, 0, 0, 0, 0]] * 3)),
        ("low_res", torch.zeros(3, 3, 8, 8)),
        ("noise_level", torch.tensor([0, 0, 0])),
        ("condition_image", torch.zeros(3, 1, 8, 8)),
        ("image_embedding", torch.zeros(3, 6)),
    ],
)
def test_every_condition_reaches_the_prediction(name, value, kind):
    network = randomized(full_network(kind))
    with torch.no_grad():
        change = network(**inputs()) - network(**(inputs() | {name: value}))
    assert (change.abs().amax((1, 2, 3)) > 1e-3).all()


def test_the_noise_level_has_an_embedding_of_its_own():
    network, known = randomized(full_network()), inputs()
    exchanged = known | {"time": known["noise_level"], "noise_level": known["time"]}
    with torch.no_grad():
        assert (network(**known) - network(**exchanged)).abs().max() > 1e-3


@KINDS
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(kind):
    network, known = randomized(full_network(kind)), inputs()
    with torch.no_grad():
        together = network(**known)
        for i in range(3):
            alone = network(**{name: value[i : i + 1] for name, value in known.items()})
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_memory_format_of_the_input_does_not_change_the_prediction():
    network, known = randomized(full_network()), inputs()
    with torch.no_grad():
        other = known | {"x_t": known["x_t"].to(memory_format=torch.channels_last)}
        torch.testing.assert_close(network(**known), network(**other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "style",
    [{}, {"scale_shift_norm": False, "resample_in_blocks": False}, {"scale_shift_norm": False, "plus_plus": True}],
)
def test_training_under_bf16_autocast_reaches_every_weight_and_stays_near_fp32(style):
    """ADM's own checkpointed attention fails in the backward of this."""
    network, known = randomized(full_network(**style)).train(), inputs()
    exact = network(**known).square().mean()
    wanted = torch.autograd.grad(exact, list(network.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(**known)
    assert prediction.dtype == torch.float32
    loss = prediction.square().mean()
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    similarity = torch.cosine_similarity(
        torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in wanted]), dim=0
    )
    assert similarity > 0.99


@KINDS
def test_a_condition_that_is_missing_or_unknown_is_refused(kind):
    known = inputs()
    with pytest.raises(ValueError, match="is conditioned on noise_level"):
        full_network(kind)(**{name: value for name, value in known.items() if name != "noise_level"})
    with pytest.raises(ValueError, match="is not conditioned on text"):
        full_network(kind, text=None)(**known)


def test_a_image_of_another_size_or_number_of_channels_is_refused():
    network, known = full_network(), inputs()
    with pytest.raises(ValueError, match="condition_image has 4 x 8 pixels, x_t has 8 x 8"):
        network(**(known | {"condition_image": torch.zeros(3, 1, 4, 8)}))
    with pytest.raises(ValueError, match=r"3 \+ 3 \+ 2 channels, this network takes 7"):
        network(**(known | {"condition_image": torch.zeros(3, 2, 8, 8)}))


def test_an_upsampler_without_noise_takes_the_level_and_does_not_look_at_it():
    """As those of ADM and GLIDE."""
    network, known = randomized(full_network(embed_noise_level=False)), inputs()
    with torch.no_grad():
        without = network(**{name: value for name, value in known.items() if name != "noise_level"})
        assert torch.equal(network(**known), without)


def test_a_learned_variance_doubles_the_output_and_starts_in_the_middle():
    predicted, v = full_network(learned_variance=True)(**inputs()).chunk(2, dim=1)
    assert predicted.shape == v.shape == (3, 3, 8, 8)
    assert v.abs().max() == 0


def test_blocks_are_computed_again_under_the_same_autocast_and_drop_the_same_units():
    networks, gradients = [randomized(full_network(dropout=0.3)).train() for _ in range(2)], []
    recompute_blocks(networks[1])
    for network in networks:
        torch.manual_seed(3)  # of the dropout
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(**inputs()).square().mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[1])


@pytest.mark.parametrize("change", [{"resolution": 9}, {"head_dim": None}, {"num_heads": 2}, {"head_dim": 3}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"halved|head_dim or num_heads"):
        UNet(**(SMALL_UNET | change))
