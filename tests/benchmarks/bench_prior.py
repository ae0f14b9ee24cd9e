"""Sampling the tokens of images with the key-value cache, ours against transformers' GPT-2 with its static cache.

Both sides: four layers of 128 dimensions and four heads, 64 tokens of a vocabulary of 512 after one condition token,
temperature 1 and top-k 100, fp32 on one thread.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.sampling.plan import Conditions
from tests.benchmarks.interleaving import Row, Step, interleaved, one_thread, raced

NUM_TOKENS, CODEBOOK_SIZE, MODEL_DIM, NUM_LAYERS, NUM_HEADS, TOP_K = 64, 512, 128, 4, 4, 100
STATIC = {"do_sample": True, "top_k": TOP_K, "cache_implementation": "static", "pad_token_id": 0}


def ours(batch_size: int) -> Step:
    sizes = {"codebook_size": CODEBOOK_SIZE, "num_tokens": NUM_TOKENS, "model_dim": MODEL_DIM, "num_layers": NUM_LAYERS}
    transformer = Transformer(**sizes, num_heads=NUM_HEADS, num_classes=10).eval()
    generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    conditions = Conditions({"label": torch.zeros(batch_size, dtype=torch.int64)}, {})

    def decode() -> None:
        tokens = generate(transformer, conditions, generators=generators, sampling=TokenSampling(top_k=TOP_K))
        assert tokens.shape == (batch_size, NUM_TOKENS)

    return decode


def peer_transformer(vocab_size: int, *, tokens: int, width: int, layers: int, heads: int) -> GPT2LMHeadModel:
    """GPT-2 without dropout and without an end of texts, of one token before `tokens` others."""
    sizes = {"vocab_size": vocab_size, "n_positions": tokens + 1, "n_embd": width, "n_layer": layers, "n_head": heads}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=None))


def peer(batch_size: int) -> Step:
    sizes = {"tokens": NUM_TOKENS, "width": MODEL_DIM, "layers": NUM_LAYERS, "heads": NUM_HEADS}
    model, condition = peer_transformer(CODEBOOK_SIZE, **sizes).eval(), torch.zeros(batch_size, 1, dtype=torch.int64)
    given = {"attention_mask": torch.ones_like(condition), "max_new_tokens": NUM_TOKENS, "disable_compile": True}

    def decode() -> None:
        assert model.generate(condition, **given, **STATIC).shape == (batch_size, NUM_TOKENS + 1)

    return decode


def rows(rounds: int) -> list[Row]:
    """64 tokens for one image and for sixteen."""
    with one_thread():
        sides = {size: {"ours": ours(size), "peer": peer(size)} for size in (1, 16)}
        return [
            raced(f"prior_decode_b{size}", interleaved(steps, rounds=max(rounds, 5), warm_up=1))
            for size, steps in sides.items()
        ]
