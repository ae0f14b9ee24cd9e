"""Sampling the tokens of images with the key-value cache, ours against transformers' GPT-2 with its static cache.

Both sides: four layers of 128 dimensions and four heads, 64 tokens of a vocabulary of 512 after one condition token,
temperature 1 and top-k 100, fp32 on one thread.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.sampling.plan import Conditions
from tests.benchmarks.interleaving import interleaved

NUM_TOKENS, CODEBOOK_SIZE, MODEL_DIM, NUM_LAYERS, NUM_HEADS, TOP_K = 64, 512, 128, 4, 4, 100


def make_ours(batch_size: int) -> Callable[[], None]:
    transformer = Transformer(
        codebook_size=CODEBOOK_SIZE,
        num_tokens=NUM_TOKENS,
        model_dim=MODEL_DIM,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_classes=10,
    ).eval()
    generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    conditions = Conditions({"label": torch.zeros(batch_size, dtype=torch.int64)}, {})

    def decode() -> None:
        tokens = generate(transformer, conditions, generators=generators, sampling=TokenSampling(top_k=TOP_K))
        assert tokens.shape == (batch_size, NUM_TOKENS)

    return decode


def make_peer(batch_size: int) -> Callable[[], None]:
    config = GPT2Config(
        vocab_size=CODEBOOK_SIZE,
        n_positions=NUM_TOKENS + 1,
        n_embd=MODEL_DIM,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    condition = torch.zeros(batch_size, 1, dtype=torch.int64)
    settings = {
        "max_new_tokens": NUM_TOKENS,
        "do_sample": True,
        "top_k": TOP_K,
        "cache_implementation": "static",
        "disable_compile": True,
    }

    def decode() -> None:
        tokens = model.generate(condition, attention_mask=torch.ones_like(condition), **settings)
        assert tokens.shape == (batch_size, NUM_TOKENS + 1)

    return decode


def row(batch_size: int, *, rounds: int) -> dict[str, Any]:
    """Medians of interleaved rounds, after one that does not count."""
    steps = {"ours": make_ours(batch_size), "peer": make_peer(batch_size)}
    times = interleaved(steps, rounds=rounds, warm_up=1)
    (ours_wall, ours_cpu), (peer_wall, peer_cpu) = times["ours"], times["peer"]
    return {
        "name": f"prior_decode_b{batch_size}",
        "ours": ours_wall,
        "peer": peer_wall,
        "ratio": ours_wall / peer_wall,
        "unit": "s",
        "cpu_ours": ours_cpu,
        "cpu_peer": peer_cpu,
    }


def rows(rounds: int) -> list[dict[str, Any]]:
    """64 tokens for one image and for sixteen."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row(batch_size, rounds=max(rounds, 5)) for batch_size in (1, 16)]
    finally:
        torch.set_num_threads(before)
