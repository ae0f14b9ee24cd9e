"""Laws of the diffusion transformer: published sizes, equality with diffusers, identity at the start, equivariance."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from components.models.dit import DiT
from tests.peer_unets import SMALL_DIT, full_network, inputs, randomized

PUBLISHED = {"resolution": 32, "in_channels": 4, "out_channels": 4, "learned_variance": True, "num_classes": 1000}


@pytest.mark.parametrize(
    ("model_dim", "num_layers", "num_heads", "millions"), [(384, 12, 6, 33), (768, 12, 12, 130), (1152, 28, 16, 675)]
)
def test_the_published_transformers_have_their_published_sizes(model_dim, num_layers, num_heads, millions):
    """DiT-S/2, B/2 and XL/2 on 32² latents: Peebles and Xie (2023), table 1, which says millions."""
    settings = {"model_dim": model_dim, "num_layers": num_layers, "num_heads": num_heads, "patch_size": 2}
    with torch.device("meta"):
        network = DiT(**PUBLISHED, **settings)
    assert abs(sum(parameter.numel() for parameter in network.parameters()) / 1e6 - millions) < 1


def copy_weights(network: DiT, peer: DiTTransformer2DModel) -> None:
    """The peer has an embedding of time and label in every block, which were one when they were published."""
    embedding = peer.transformer_blocks[0].norm1.emb
    pairs = [
        (network.time_mlp, embedding.timestep_embedder.parameters()),
        (network.class_embedding, embedding.class_embedder.parameters()),
        (network.patches, peer.pos_embed.proj.parameters()),
        (network.modulation_out, peer.proj_out_1.parameters()),
        (network.linear_out, peer.proj_out_2.parameters()),
    ]
    for block, other in zip(network.blocks, peer.transformer_blocks, strict=True):
        other.norm1.emb = embedding
        attention = other.attn1
        qkv = [
            torch.cat([getattr(attention.get_submodule(name), part) for name in ("to_q", "to_k", "to_v")])
            for part in ("weight", "bias")
        ]
        weights = [*other.norm1.linear.parameters(), *qkv, *attention.to_out[0].parameters(), *other.ff.parameters()]
        pairs.append((block, weights))
    embedding.time_proj.downscale_freq_shift = 0  # as published; their default is another
    with torch.no_grad():
        for mine, theirs in pairs:
            for parameter, tensor in zip(mine.parameters(), theirs, strict=True):
                parameter.copy_(tensor)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_network_equals_that_of_diffusers_under_a_map_of_weights(patch_size):
    network = DiT(**(SMALL_DIT | {"patch_size": patch_size}), num_classes=9, learned_variance=True).eval()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2}
    sizes |= {"sample_size": 8, "patch_size": patch_size, "num_embeds_ada_norm": 9}
    peer = DiTTransformer2DModel(**sizes, norm_eps=1e-6)
    copy_weights(network, randomized(peer))
    network, peer = network.double(), peer.double()
    x_t, time, label = torch.randn(2, 3, 8, 8).double(), torch.tensor([3, 977]), torch.tensor([0, 9])
    with torch.no_grad():
        ours, theirs = network(x_t, time, label=label), peer(x_t, time, class_labels=label).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


def test_a_new_network_predicts_nothing_and_its_blocks_pass_their_input_on():
    """adaLN-Zero: every gate is closed at the start."""
    network = full_network("dit")
    assert network(**inputs()).abs().max() == 0
    x = torch.randn(2, 16, 16)
    assert all(torch.equal(block(x, torch.randn(2, 16)), x) for block in network.blocks)


def test_without_positions_patches_may_be_moved_and_with_them_not():
    network, known = randomized(DiT(**SMALL_DIT)), {"x_t": inputs()["x_t"], "time": inputs()["time"]}
    moved = known | {"x_t": known["x_t"].roll((2, 4), dims=(2, 3))}  # by whole patches
    with torch.no_grad():
        assert (network(**moved) - network(**known).roll((2, 4), dims=(2, 3))).abs().max() > 1e-3
        network.positions.zero_()
        torch.testing.assert_close(network(**moved), network(**known).roll((2, 4), dims=(2, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"model_dim": 6, "num_heads": 1}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"not a multiple of"):
        DiT(**(SMALL_DIT | change))
    with pytest.raises(ValueError, match="x_t is 4 x 8, this network takes 8 squared"):
        full_network("dit")(**(inputs() | {"x_t": torch.zeros(3, 3, 4, 8)}))
