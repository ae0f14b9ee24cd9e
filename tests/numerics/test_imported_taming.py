"""A whole checkpoint of taming's transformer after depth or segmentation: three models, a cascade that samples.

The transformer is compared with GPT-2 of transformers, whose blocks are the same; first stages are in
`test_foreign_layouts.py`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from components.sampling.cascade import Cascade
from pipelines.command.loading import load_cascade
from tests.foreign_weights import first_stage_layers, gpt_layers, tensors_of
from tests.in_process import in_process
from tests.refusals import assert_refused

CODES, SEEN, WIDTH, DEPTH, HEADS, PLACES = 64, 48, 32, 2, 4, 16  # of the image, of the condition; places of each
SIZES = "resolution=16 channels=8 channel_mult=[1,1,2] num_res_blocks=1 attention_resolutions=[4] latent_channels=8"
SIZES += " norm_groups=4 bottleneck.codebook_size={codes}"
PRIOR = f"model_dim={WIDTH} num_layers={DEPTH} num_heads={HEADS}".split()


def first_stage(prefix: str, codes: int, channels: int) -> dict[str, Tensor]:
    layers = first_stage_layers(8, (1, 1, 2), 1, (2,), 8, (8, 8), channels)
    tensors = tensors_of(layers, device="cpu", quantize__embedding__weight=(codes, 8))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def checkpoint(channels: int) -> dict[str, Tensor]:
    tables = {"tok_emb__weight": (CODES, WIDTH), "head__weight": (CODES, WIDTH), "pos_emb": (1, 2 * PLACES, WIDTH)}
    own = tensors_of(gpt_layers(WIDTH, DEPTH), device="cpu", **tables)
    own |= {f"blocks.{block}.attn.mask": torch.ones(1, 1, 2 * PLACES, 2 * PLACES).tril() for block in range(DEPTH)}
    whole = {f"transformer.{name}": tensor for name, tensor in own.items()}
    seen = first_stage("cond_stage_model.", SEEN, channels) | {"cond_stage_model.colorize": torch.zeros(3, 9, 1, 1)}
    return whole | first_stage("first_stage_model.", CODES, 3) | seen


def sets(member: str) -> list[str]:
    changes = [f"tokenizer.{each}" for each in SIZES.format(codes=CODES).split()]
    changes += [f"condition.tokenizer.{each}" for each in SIZES.format(codes=SEEN).split()]
    changes += [f"prior.{each}" for each in PRIOR] + ["images.resolution=16"]
    changes += [f"condition.{part}.member={member}" for part in ("tokenizer", "tokens")]
    return [word for change in changes for word in ("--set", change)]


def imported(folder: Path, channels: int) -> Cascade:
    """The cascade that the command makes of a checkpoint in `folder`."""
    save_file(checkpoint(channels), folder / "theirs.safetensors")
    member = "depth" if channels == 1 else "mask"
    command = ["import", "theirs.safetensors", "--as", "imagenet_depth_prior/cascade", "--out", "ours", *sets(member)]
    done = in_process(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "next: cascade sample --model ours --condition image.png"
    return load_cascade(str(folder / "ours"), None)


def gpt2(tensors: dict[str, Tensor]) -> GPT2LMHeadModel:
    """The transformer of a checkpoint as the class of transformers, whose matrices are the other way round."""
    sizes = {"n_positions": 2 * PLACES, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "vocab_size": CODES}
    model = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu", tie_word_embeddings=False)).eval()
    own = {name.removeprefix("transformer."): each for name, each in tensors.items() if name.startswith("transformer.")}
    state = {"transformer.wte.weight": own["tok_emb.weight"], "transformer.wpe.weight": own["pos_emb"][0]}
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = own[f"ln_f.{kind}"]
        for block in range(DEPTH):
            place, there = f"blocks.{block}", f"transformer.h.{block}"
            qkv = torch.cat([own[f"{place}.attn.{name}.{kind}"] for name in ("query", "key", "value")])
            parts = {"attn.c_attn": qkv, "attn.c_proj": own[f"{place}.attn.proj.{kind}"]}
            parts |= {"mlp.c_fc": own[f"{place}.mlp.0.{kind}"], "mlp.c_proj": own[f"{place}.mlp.2.{kind}"]}
            state |= {f"{there}.{name}.{kind}": each.T if kind == "weight" else each for name, each in parts.items()}
            state |= {f"{there}.ln_{norm}.{kind}": own[f"{place}.ln{norm}.{kind}"] for norm in (1, 2)}
    model.load_state_dict(state | {"lm_head.weight": own["head.weight"]})
    return model


@pytest.mark.parametrize("channels", [1, 182])
@torch.no_grad()
def test_a_checkpoint_of_three_models_becomes_a_cascade_that_computes_what_gpt2_computes(tmp_path: Path, channels: int):
    cascade = imported(tmp_path, channels)
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(0, SEEN, (2, PLACES), generator=generator)
    tokens = torch.randint(0, CODES, (2, PLACES), generator=generator)
    peer = gpt2(load_file(tmp_path / "theirs.safetensors"))
    expected = peer(torch.cat([seen, tokens], dim=1)[:, :-1]).logits[:, PLACES - 1 :]
    found = cascade.prior.module(tokens, condition=seen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (cascade.tokenizer.module.image_channels, cascade.condition.module.image_channels) == (3, channels)
    assert (cascade.tokenizer.module.codebook_size, cascade.condition.module.codebook_size) == (CODES, SEEN)


def test_a_map_of_classes_is_read_by_its_numbers_and_one_of_an_unknown_class_is_refused(tmp_path: Path):
    cascade = imported(tmp_path, 182)
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16) % 182
    Image.fromarray(classes).save(tmp_path / "map.png")
    command = ["sample", "--model", "ours", "--count", "1", "--condition"]
    done = in_process(*command, "map.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    large = Image.fromarray(classes.repeat(3, axis=0).repeat(3, axis=1))  # as a service may be sent it
    assert cascade.condition_images == (16, "mask", 182)
    large.save(tmp_path / "large.png")
    assert in_process(*command, "large.png", "--out", "large", cwd=tmp_path).returncode == 0
    made = [next(path.glob("condition*")).read_bytes() for path in (tmp_path / "samples", tmp_path / "large")]
    assert made[0] == made[1]
    Image.fromarray(classes + 10).save(tmp_path / "unknown.png")
    assert_refused(in_process(*command, "unknown.png", cwd=tmp_path), "the mask holds the value 191")


def test_what_is_not_in_one_file_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path):
    whole = {name: each for name, each in checkpoint(1).items() if not name.startswith("cond_stage_model.")}
    save_file(whole, tmp_path / "theirs.safetensors")
    command = ["import", "theirs.safetensors", "--out", "ours", "--as"]
    own = sets("depth")
    lacking = in_process(*command, "imagenet_depth_prior/cascade", *own, cwd=tmp_path)
    assert_refused(lacking, "condition_tokenizer takes a network autoencoder under cond_stage_model.*")
    assert_refused(in_process(*command, "adm_imagenet_64_256/cascade", cwd=tmp_path), "no file holds", "one by one")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]
