"""Sampling the tokens of images with the key-value cache, ours against transformers' GPT-2 in the fastest of its forms:
its growing or its static cache, its attention by `sdpa` or written out, and a loop of its forward alone, without what
`generate` does around it.

Both sides: four layers of 128 dimensions and four heads, 64 tokens of a vocabulary of 512 after one condition token,
temperature 1 and top-k 100, fp32 on one thread.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.sampling.plan import Conditions
from tests.benchmarks.interleaving import Row, Step, interleaved, one_thread, raced

NUM_TOKENS, CODEBOOK_SIZE, MODEL_DIM, NUM_LAYERS, NUM_HEADS, TOP_K = 64, 512, 128, 4, 4, 100
SAMPLED = {"do_sample": True, "top_k": TOP_K, "pad_token_id": 0}
ATTENTIONS = ("sdpa", "eager")
CACHES: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "growing": {}}


def ours(batch_size: int) -> Step:
    sizes = {"codebook_size": CODEBOOK_SIZE, "num_tokens": NUM_TOKENS, "model_dim": MODEL_DIM, "num_layers": NUM_LAYERS}
    transformer = Transformer(**sizes, num_heads=NUM_HEADS, num_classes=10).eval()
    generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    conditions = Conditions({"label": torch.zeros(batch_size, dtype=torch.int64)}, {})

    def decode() -> None:
        tokens = generate(transformer, conditions, generators=generators, sampling=TokenSampling(top_k=TOP_K))
        assert tokens.shape == (batch_size, NUM_TOKENS)

    return decode


def peer_transformer(
    vocab_size: int, *, tokens: int, width: int, layers: int, heads: int, attention: str = "sdpa"
) -> GPT2LMHeadModel:
    """GPT-2 without dropout and without an end of texts, of one token before `tokens` others."""
    sizes = {"vocab_size": vocab_size, "n_positions": tokens + 1, "n_embd": width, "n_layer": layers, "n_head": heads}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=None, attn_implementation=attention)
    return GPT2LMHeadModel(config)


def peers(batch_size: int) -> dict[str, Step]:
    """Steps of the peer's forms by name."""
    sizes = {"tokens": NUM_TOKENS, "width": MODEL_DIM, "layers": NUM_LAYERS, "heads": NUM_HEADS}
    condition = torch.zeros(batch_size, 1, dtype=torch.int64)
    given = {"attention_mask": torch.ones_like(condition), "max_new_tokens": NUM_TOKENS, "disable_compile": True}

    def generate_by(model: GPT2LMHeadModel, cache: dict[str, Any]) -> None:
        assert model.generate(condition, **given, **SAMPLED, **cache).shape == (batch_size, NUM_TOKENS + 1)

    @torch.inference_mode()
    def loop(model: GPT2LMHeadModel) -> None:
        token, cache, tokens = condition, None, []
        for _ in range(NUM_TOKENS):
            output = model(token, cache=cache, use_cache=True)
            cache, best = output.cache, output.logits[:, -1].topk(TOP_K)
            token = best.indices.gather(1, best.values.softmax(-1).multinomial(1))
            tokens.append(token)
        assert torch.cat(tokens, 1).shape == (batch_size, NUM_TOKENS)

    models = {
        attention: peer_transformer(CODEBOOK_SIZE, **sizes, attention=attention).eval() for attention in ATTENTIONS
    }
    forms = product(models.items(), CACHES.items())
    steps = {
        f"peer {attention} {name}": partial(generate_by, model, cache) for (attention, model), (name, cache) in forms
    }
    return steps | {"peer loop": partial(loop, models["sdpa"])}


def rows(rounds: int) -> list[Row]:
    """64 tokens for one image and for sixteen."""
    with one_thread():
        sides = {size: {"ours": ours(size), **peers(size)} for size in (1, 16)}
        return [
            raced(f"prior_decode_b{size}", interleaved(steps, rounds=max(rounds, 5), warm_up=1))
            for size, steps in sides.items()
        ]
