"""Laws of the vector quantizer; the oracle is vector-quantize-pytorch."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from components.models.bottleneck import (
    EMAQuantizer,
    codebook_histogram,
    codebook_perplexity,
    codebook_usage,
    nearest_codes,
)
from components.training.parallel import Worker
from tests.distributed.gloo import run_ranks

TOLERANCE = {"atol": 1.2e-6, "rtol": 0.0}  # ten times the difference measured between implementations


def make_quantizer(*, codebook_size: int = 16, dim: int = 8, threshold: float = 0.0, normalize: bool = True):
    """A quantizer with the oracle's initial state."""
    sizes = {"codebook_size": codebook_size, "codebook_dim": dim, "codebook_decay": 0.8}
    quantizer = EMAQuantizer(**sizes, dead_code_threshold=threshold, l2_normalize=normalize)
    quantizer.initialized.fill_(True)
    return quantizer


def update(quantizer: EMAQuantizer, z_e: Tensor, *, seed: int = 0) -> Tensor:
    out = quantizer(z_e)
    generator = torch.Generator().manual_seed(seed)
    return quantizer.update_codebook(out.latents, indices=out.indices, generator=generator)


@pytest.mark.parametrize("normalize", [True, False])
def test_codes_indices_loss_and_ema_equal_the_oracle_over_several_steps(normalize: bool):
    """taming-transformers #57 and 1d-tokenizer #120: the weight stood on the wrong term, and nothing failed."""
    ours = make_quantizer(normalize=normalize)
    how = {"use_cosine_sim": normalize, "rotation_trick": False, "commitment_weight": 1.0, "accept_image_fmap": True}
    peer = VectorQuantize(dim=8, codebook_size=16, decay=0.8, **how).train()
    peer.codebook = ours.codebook
    peer._codebook.embed_avg.copy_(ours.codebook)
    for _ in range(6):
        z_e = torch.randn(3, 8, 4, 4, requires_grad=True)
        z_q, indices, loss = peer(z_e)
        out = ours(z_e)
        torch.testing.assert_close(out.indices, indices, rtol=0, atol=0)
        torch.testing.assert_close(out.z, z_q, **TOLERANCE)
        torch.testing.assert_close(out.losses["commitment_loss"], loss.squeeze(), **TOLERANCE)
        direction = torch.randn_like(z_q)
        pairs = ((out.z, out.losses["commitment_loss"]), (z_q, loss.squeeze()))
        ours_grad, peer_grad = (torch.autograd.grad((z * direction).sum() + own, z_e)[0] for z, own in pairs)
        torch.testing.assert_close(ours_grad, peer_grad, **TOLERANCE)
        ours.update_codebook(out.latents, indices=out.indices, generator=torch.Generator())
        torch.testing.assert_close(ours.codebook, peer.codebook, **TOLERANCE)
        torch.testing.assert_close(ours.ema_count, peer._codebook.cluster_size[0], atol=1e-5, rtol=0)


def test_the_gradient_goes_straight_through_to_the_normalized_latents():
    quantizer = make_quantizer()
    z_e = torch.randn(2, 8, 4, 4, requires_grad=True)
    direction = torch.randn(2, 8, 4, 4)
    out = quantizer(z_e)
    assert torch.equal(out.z, quantizer.lookup(out.indices))  # the value is exactly that of the codes
    (through,) = torch.autograd.grad(out.z, z_e, direction)
    (around,) = torch.autograd.grad(torch.nn.functional.normalize(z_e, dim=1), z_e, direction)
    torch.testing.assert_close(through, around)


def test_the_nearest_code_is_found_in_fp32_under_autocast():
    quantizer = make_quantizer(codebook_size=512)
    z = torch.nn.functional.normalize(torch.randn(4, 8, 8, 8), dim=1)
    expected = torch.cdist(rearrange(z, "b c h w -> (b h w) c").double(), quantizer.codebook.double()).argmin(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = nearest_codes(rearrange(z, "b c h w -> b h w c"), quantizer.codebook)
        assert quantizer(z).losses["commitment_loss"].dtype == torch.float32
    assert torch.equal(indices.flatten(), expected)


def test_a_dead_code_restarts_at_a_latent_of_the_batch_and_its_count_and_sum_with_it():
    """espnet #6284: a stale sum wrote the dead code back over its replacement."""
    quantizer = make_quantizer(threshold=0.1)
    away = torch.nn.functional.one_hot(torch.tensor(7), 8).float()
    quantizer.codebook[3] = -away
    quantizer.ema_sum[3], quantizer.ema_count[3] = -away * 1e-3, 1e-3
    z_e = torch.randn(4, 8, 4, 4)
    z_e[:, 7] = z_e[:, 7].abs() + 3  # no latent is near code 3
    latents = quantizer(z_e).latents
    dead = update(quantizer, z_e)
    assert dead >= 1
    assert (quantizer.codebook[3] - latents).abs().sum(dim=1).min() == 0
    assert quantizer.ema_count[3] == 4.0  # the mean count of the batch: 64 latents, 16 codes
    torch.testing.assert_close(quantizer.ema_sum[3], quantizer.codebook[3] * quantizer.ema_count[3])
    before = quantizer.codebook[3].clone()
    nothing, quantizer.dead_code_threshold = torch.zeros(0, dtype=torch.int64), 0.0
    quantizer.update_codebook(torch.zeros(0, 8), indices=nothing, generator=torch.Generator())
    torch.testing.assert_close(quantizer.codebook[3], before)


def test_the_first_update_initializes_every_code_from_the_data():
    quantizer = EMAQuantizer(codebook_size=16, codebook_dim=4)
    z_e = torch.randn(2, 4, 4, 4)
    latents = quantizer(z_e).latents
    assert update(quantizer, z_e) == 16
    assert torch.cdist(quantizer.codebook, latents).min(dim=1).values.max() < 1e-3
    assert len(quantizer.codebook.unique(dim=0)) == 16
    assert update(quantizer, z_e) == 0


def test_kmeans_initialization_finds_the_clusters_of_the_first_batch():
    generator = torch.Generator().manual_seed(0)
    z_e = torch.randn(4, 4, 16, 16, generator=generator)
    spread = {}
    for init in ("data", "kmeans"):
        quantizer = EMAQuantizer(codebook_size=32, codebook_dim=4, l2_normalize=False, codebook_init=init)
        update(quantizer, z_e)
        spread[init] = float(quantizer(z_e).losses["commitment_loss"])
    assert spread["kmeans"] < 0.8 * spread["data"]


def test_more_codes_than_latents_still_gives_a_codebook_of_latents():
    quantizer = EMAQuantizer(codebook_size=16, codebook_dim=4)
    z_e = torch.randn(1, 4, 2, 2)
    update(quantizer, z_e)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))
    assert len(quantizer.codebook.unique(dim=0)) == 4


def train_shard(worker: Worker, folder: str, init: str) -> None:
    """Six updates on this rank's samples of each global batch; rank r saves its codebook."""
    torch.manual_seed(0)
    quantizer = make_quantizer(codebook_size=32, threshold=0.5)
    quantizer.initialized.fill_(False)
    quantizer.codebook_init = init
    for step in range(6):
        batch = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step))
        update(quantizer, batch[worker.rank :: worker.world_size], seed=step)  # as ranks read the stream
    torch.save(quantizer.state_dict(), Path(folder) / f"{worker.world_size}-{worker.rank}.pt")


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_two_ranks_give_the_codebook_of_one_on_the_whole_batch_bit_for_bit(init: str, tmp_path: Path):
    train_shard(Worker(0, 1, torch.device("cpu")), str(tmp_path), init)
    run_ranks(2, train_shard, str(tmp_path), init)
    expected, *states = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert (expected["ema_count"] != 1).any()
    for state in states:
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_usage_and_perplexity_come_from_a_whole_epoch_and_not_from_its_batches():
    """bshall/VectorQuantizedVAE #3: a small batch cannot show many codes, so its perplexity says nothing."""
    batches = torch.arange(512).view(16, 32)
    histogram = sum(codebook_histogram(batch, codebook_size=512) for batch in batches)
    assert codebook_usage(histogram) == 1.0
    torch.testing.assert_close(codebook_perplexity(histogram), torch.tensor(512.0, dtype=torch.float64))
    one_batch = codebook_histogram(batches[0], codebook_size=512)
    assert codebook_usage(one_batch) == 1 / 16
    torch.testing.assert_close(codebook_perplexity(one_batch), torch.tensor(32.0, dtype=torch.float64))
