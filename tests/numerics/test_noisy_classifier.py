"""Laws of ADM's classifier of noisy images: published sizes, its pool by the formula, and what it depends on."""

import pytest
import torch

from components.models.noisy_classifier import AttentionPool2d, NoisyClassifier
from tests.peer_unets import randomized

SMALL = {
    "resolution": 8,
    "num_classes": 7,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_dim": 8,
}


def test_the_pool_is_attention_of_the_mean():
    """torch's own multi-head attention over the mean and all positions; of its answers the first one counts."""
    pool = randomized(AttentionPool2d(16, size=3, num_heads=2, out_features=7)).double()
    x = torch.randn(2, 16, 3, 3).double()
    tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)], dim=1) + pool.positions
    peer = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    peer.load_state_dict(
        {
            "in_proj_weight": pool.qkv.weight,
            "in_proj_bias": pool.qkv.bias,
            "out_proj.weight": torch.eye(16),
            "out_proj.bias": torch.zeros(16),
        }
    )
    with torch.no_grad():
        wanted = pool.proj(peer(tokens, tokens, tokens)[0][:, 0])
        torch.testing.assert_close(pool(x), wanted, atol=1e-12, rtol=0)


def test_logits_depend_on_every_pixel_and_on_the_time():
    network = randomized(NoisyClassifier(**SMALL))
    x_t, time = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([1, 500])
    logits = network(x_t, time)
    assert logits.shape == (2, 7)
    gradient = torch.autograd.grad(logits.log_softmax(1)[:, 3].sum(), x_t)[0]
    assert (gradient != 0).all()
    assert (logits - network(x_t, time.flip(0))).abs().amax(1).min() > 1e-3


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    network, x_t, time = randomized(NoisyClassifier(**SMALL)), torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 900])
    with torch.no_grad():
        torch.testing.assert_close(network(x_t, time)[1:2], network(x_t[1:2], time[1:2]), atol=1e-5, rtol=1e-5)


def test_the_pool_knows_where_things_are():
    pool, x = randomized(AttentionPool2d(16, size=3, num_heads=2, out_features=7)), torch.randn(1, 16, 3, 3)
    with torch.no_grad():
        assert (pool(x) - pool(x.flip(3))).abs().max() > 1e-3


def test_training_under_bf16_autocast_reaches_every_weight():
    network, x_t = randomized(NoisyClassifier(**SMALL)).train(), torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x_t, torch.tensor([1, 500, 900, 20]))
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("change", [{"resolution": 9}, {"head_dim": None}, {"head_dim": 3}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"halved|head_dim or num_heads"):
        NoisyClassifier(**(SMALL | change))


def test_a_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="x_t is 4 x 4, this network takes 8 squared"):
        NoisyClassifier(**SMALL)(torch.zeros(1, 3, 4, 4), torch.tensor([0]))
