"""Weights of published code fit the recipes of their papers: names and shapes at full size, without memory.

Generated tables count as many parameters as was published, so they are no copy of ours. Outputs are compared with those
of diffusers in `test_imported_diffusers.py`; the other codes are no packages."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from components.models.dit import grid_positions
from components.weights.families import edm
from components.weights.families.transformers import of_igpt
from components.weights.families.unets import of_openai
from components.weights.files import CaptionTokenizer
from components.weights.importing import Fitted, fit
from pipelines.command.upkeep import targets_of
from tests.foreign_weights import (
    adm_layers,
    dit_layers,
    edm_layers,
    file_of,
    first_stage_layers,
    glide_layers,
    gpt_layers,
    mindalle_tables,
    tensors_of,
    words_of,
)

ADM_64, ADM_128, ADM_256, ADM_512 = (1, 2, 3, 4), (1, 1, 2, 3, 4), (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
LABELS = {width: {"label_emb__weight": (1000, 4 * width)} for width in (192, 256)}


def pooled(channels: int, side: int) -> dict[str, tuple[int, ...]]:
    """The table of a classifier's pool."""
    return {"out__2__positional_embedding": (channels, side**2 + 1)}


CLASSIFIER = partial(adm_layers, 128, out_channels=1000, is_classifier=True)
UNETS = {  # stage -> layers; tables, of networks that know classes; parameters
    "iddpm_imagenet_64/base": (
        partial(adm_layers, 128, ADM_64, 3, (4, 8), 6, resample_in_blocks=False),
        {},
        121_063_942,
    ),
    "adm_imagenet_64_256/base": (partial(adm_layers, 192, ADM_64, 3, (2, 4, 8), 6), LABELS[192], 295_904_454),
    "adm_imagenet_128_512/base": (partial(adm_layers, 256, ADM_128, 2, (4, 8, 16), 6), LABELS[256], 421_529_606),
    "adm_imagenet_256/base": (partial(adm_layers, 256, ADM_256, 2, (8, 16, 32), 6), LABELS[256], 553_838_086),
    "adm_imagenet_256_unconditional/base": (partial(adm_layers, 256, ADM_256, 2, (8, 16, 32), 6), {}, 552_814_086),
    "adm_imagenet_512/base": (partial(adm_layers, 256, ADM_512, 2, (16, 32, 64), 6), LABELS[256], 558_997_638),
    "adm_imagenet_64_256/upsampler_256": (
        partial(adm_layers, 192, ADM_256, 2, (8, 16, 32), 6, 6),
        LABELS[192],
        311_795_910,
    ),
    "adm_imagenet_128_512/upsampler_512": (
        partial(adm_layers, 192, ADM_256, 2, (16, 32), 6, 6),
        LABELS[192],
        308_835_270,
    ),
    "adm_imagenet_64_256/classifier": (partial(CLASSIFIER, ADM_64, 4, (2, 4, 8)), pooled(512, 8), 65_438_568),
    "adm_imagenet_128_512/classifier": (partial(CLASSIFIER, ADM_128, 2, (4, 8, 16)), pooled(512, 8), 42_568_040),
    "adm_imagenet_256/classifier": (partial(CLASSIFIER, ADM_256, 2, (8, 16, 32)), pooled(512, 8), 54_096_360),
    "adm_imagenet_512/classifier": (partial(CLASSIFIER, ADM_512, 2, (16, 32, 64)), pooled(512, 8), 54_448_360),
}
ADDED = partial(adm_layers, resample_in_blocks=False, scale_shift=False)
LATENT_UNETS = {  # stage -> layers, rows of labels, parameters without these, scale of the latents
    "ldm_ffhq_f4/base": (partial(ADDED, 224, (1, 2, 3, 4), 2, (2, 4, 8), 3), 0, 274_056_163, 1.0),
    "ldm_imagenet_f8/base": (
        partial(ADDED, 256, (1, 2, 4), 2, (1, 2, 4), 4, 4, context=512),
        1000,
        394_984_196,
        1.0,
    ),
    "ldm_imagenet_f4/base": (
        partial(ADDED, 192, (1, 2, 3, 5), 2, (2, 4, 8), 3, context=512),
        1001,
        400_920_579,
        1.0,
    ),
    "ldm_text_to_image/base": (
        partial(ADDED, 320, (1, 2, 4, 4), 2, (1, 2, 4), 4, 4, context=1280),
        0,
        872_300_484,
        0.18215,
    ),
}
F16, F8_VQ = (1, 1, 2, 2, 4), (1, 2, 2, 4)
FIRST_STAGES = {  # stage -> levels, those with attention, latent channels, codes, parameters
    "vqgan_imagenet_f16_1024/tokenizer": (F16, (4,), 256, 1024, 72_141_699),
    "imagenet_class_prior/tokenizer": (F16, (4,), 256, 16_384, 76_073_859),
    "ldm_kl_f4/vae": ((1, 2, 4), (), 3, None, 55_312_063),
    "ldm_kl_f8/vae": ((1, 2, 4, 4), (), 4, None, 83_653_863),
    "ldm_kl_f16/vae": (F16, (4,), 16, None, 69_610_963),
    "ldm_vq_f4/tokenizer": ((1, 2, 4), (), 3, 8192, 55_322_782),
    "ldm_vq_f8/tokenizer": (F8_VQ, (3,), 4, 16_384, 67_717_295),
    "ldm_vq_f16/tokenizer": (F16, (4,), 8, 16_384, 69_593_371),
}


def fitted_to(
    stage: str, tensors: dict[str, Tensor], *assignments: str, words: CaptionTokenizer | None = None
) -> Fitted:
    """The tensors in the network of a recipe's stage, with the tokenizer of a model that reads captions."""
    (target,) = targets_of(stage, [*assignments])[0].values()
    return fit(file_of(tensors), target, words)


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("stage", UNETS)
def test_a_published_unet_fits_its_recipe(stage: str):
    layers, tables, parameters = UNETS[stage]
    tensors = tensors_of(layers(), **tables)
    found = fitted_to(stage, tensors)
    assert (count(tensors), found.network["num_classes"]) == (parameters, 1000 if tables else None)


@pytest.mark.parametrize("stage", LATENT_UNETS)
def test_a_published_unet_of_latents_fits_its_recipe_by_its_average(stage: str):
    """Inside a checkpoint: averages have names without dots, and labels a table beside the network."""
    layers, rows, parameters, scale = LATENT_UNETS[stage]
    tensors = tensors_of(layers())
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    names = {name: f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}" for name in tensors}
    averages = {names[name]: torch.empty_like(tensor) for name, tensor in tensors.items()}
    table = {"cond_stage_model.embedding.weight": torch.empty(rows, 512, device="meta")} if rows else {}
    found = fitted_to(stage, inside | averages | table | {"first_stage_model.quant_conv.bias": torch.empty(1)})
    taken = found.recognized.tensors
    assert all(taken[name] is averages[names[name]] for name in tensors)
    assert (count(tensors), found.settings["latent_scale"]) == (parameters, scale)
    assert found.network["num_classes"] == (1000 if rows else None)


@pytest.mark.parametrize("stage", FIRST_STAGES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_published_first_stage_fits_its_recipe(stage: str, prefix: str):
    """Alone, or inside a checkpoint of the model on its latents; its losses' networks are left out."""
    mult, attention, latents, codes, parameters = FIRST_STAGES[stage]
    dim = (latents, latents) if codes else (2 * latents, latents)
    tensors = tensors_of(first_stage_layers(128, mult, 2, attention, latents, dim))
    tensors |= {} if codes is None else {"quantize.embedding.weight": torch.empty(codes, latents, device="meta")}
    more = {"loss.discriminator.main.0.weight": torch.empty(1), "model_ema.decay": torch.empty(1)}
    found = fitted_to(stage, {prefix + name: tensor for name, tensor in (tensors | more).items()})
    assert (count(tensors), found.recognized.left_out) == (parameters, 2)


def test_first_stages_of_other_images_and_with_attention_in_the_encoder_alone_fit_by_what_their_names_say():
    """MAR's KL-16; taming's autoencoders of depth maps and of segmentation maps of 182 classes."""
    mar = tensors_of(first_stage_layers(128, F16, 2, (4,), 16, (32, 16), decoder_attention=()))
    found = fitted_to("ldm_kl_f16/vae", mar)
    of_decoder = 3 * (2 * 512 + 4 * (512 * 512 + 512))  # three attentions fewer than kl-f16
    assert (count(mar), found.network["decoder_attention_resolutions"]) == (69_610_963 - of_decoder, [])
    for channels in (1, 182):
        maps = tensors_of(first_stage_layers(128, F16, 2, (4,), 256, (256, 256), channels))
        maps |= {"quantize.embedding.weight": torch.empty(1024, 256, device="meta")}
        found = fitted_to("vqgan_imagenet_f16_1024/tokenizer", maps | {"colorize": torch.empty(3, channels, 1, 1)})
        assert (found.network["image_channels"], found.recognized.left_out) == (channels, 1)
        assert "decoder_attention_resolutions" not in found.network


def in_llamagen(name: str, levels: int) -> str:
    """Name of a tensor of taming's VQ-GAN in LlamaGen, which counts the decoder's levels from the features."""
    name = re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    name = re.sub(
        r"\.(?:down|up)\.(\d+)\.(block)?", lambda found: f".conv_blocks.{found[1]}.{'res' * bool(found[2])}", name
    )
    return re.sub(r"mid\.(block_1|attn_1|block_2)", lambda found: f"mid.{MIDDLE.index(found[1])}", name)


MIDDLE = ("block_1", "attn_1", "block_2")


@pytest.mark.parametrize(("mult", "parameters"), [(F16, 71_883_403), (F8_VQ, 70_109_835)])
def test_the_vq_of_llamagen_is_taming_s_by_other_names_with_codes_compared_by_direction(mult, parameters: int):
    """VQ-16 and VQ-8 at full size; a small one has the tensors of taming's, wherever they stand."""
    tensors = tensors_of(first_stage_layers(128, mult, 2, (len(mult) - 1,), 256, (8, 8)))
    tensors = {in_llamagen(name, len(mult)): tensor for name, tensor in tensors.items()}
    tensors["quantize.embedding.weight"] = torch.empty(16_384, 8, device="meta")
    found = fitted_to("vqgan_imagenet_f16_1024/tokenizer", tensors | {"quantize.codebook_used": torch.empty(65_536)})
    assert (count(tensors), found.recognized.left_out) == (parameters, 1)
    assert (found.network["channel_mult"], found.network["bottleneck"]["l2_normalize"]) == ([*mult], True)
    small = tensors_of(first_stage_layers(8, mult, 2, (len(mult) - 1,), 16, (4, 4)), device="cpu")
    small["quantize.embedding.weight"] = torch.randn(32, 4)
    attends = 256 >> len(mult) - 1
    sizes = [f"channels=8 channel_mult={[*mult]} num_res_blocks=2 attention_resolutions=[{attends}] latent_channels=16"]
    sizes += ["norm_groups=4 bottleneck.codebook_size=32 bottleneck.codebook_dim=4"]
    changes = " ".join(sizes).replace(", ", ",").split()
    theirs = {in_llamagen(name, len(mult)): tensor for name, tensor in small.items()}
    ours = [fitted_to("vqgan_imagenet_f16_1024/tokenizer", each, *changes).tensors for each in (small, theirs)]
    assert ours[0].keys() == ours[1].keys()
    assert all(torch.equal(tensor, ours[1][name]) for name, tensor in ours[0].items())


def test_taming_s_transformer_fits_its_recipe_with_classes_of_the_codes_table():
    width, codes = 1536, 16_384
    tables = {"tok_emb__weight": (codes, width), "head__weight": (codes, width), "pos_emb": (1, 256, width)}
    tensors = tensors_of(gpt_layers(width, 48), **tables)
    masks = {f"blocks.{block}.attn.mask": torch.empty(1, 1, 256, 256, device="meta") for block in range(48)}
    inside = {f"transformer.{name}": tensor for name, tensor in (tensors | masks).items()}
    found = fitted_to("imagenet_class_prior/prior", inside | {"first_stage_model.quant_conv.bias": torch.empty(1)})
    assert (found.network["num_classes"], found.recognized.left_out) == (1000, 49)
    assert round(count(tensors) / 1e9, 1) == 1.4


def test_taming_s_transformer_after_depth_fits_its_recipe_with_both_first_stages():
    """The table of codes serves condition and image; positions of both are one table, whose last predicts nothing."""
    tables = {"tok_emb__weight": (1024, 1024), "head__weight": (1024, 1024), "pos_emb": (1, 512, 1024)}
    parts = {"transformer.": tensors_of(gpt_layers(1024, 24), **tables)}
    for prefix, channels in (("first_stage_model.", 3), ("cond_stage_model.", 1)):
        layers = first_stage_layers(128, F16, 2, (4,), 256, (256, 256), channels)
        parts[prefix] = tensors_of(layers, quantize__embedding__weight=(1024, 256))
    whole = file_of({prefix + name: each for prefix, own in parts.items() for name, each in own.items()})
    found = {name: fit(whole, each) for name, each in targets_of("imagenet_depth_prior/cascade", [])[0].items()}
    assert [count(own) for own in parts.values()] == [304_932_864, 72_141_699, 72_137_089]
    assert [found[name].network.get("image_channels", 3) for name in ("tokenizer", "condition")] == [3, 1]
    prior = found["prior"].tensors
    sizes = [len(prior[name]) for name in ("condition_embedding.weight", "condition_position", "position")]
    assert sizes == [1025, 256, 255]


@pytest.mark.parametrize("by_class", [True, False])
def test_igpt_fits_the_recipe_of_its_sizes(by_class: bool):
    width, codes = 1536, 16_384
    tables = {
        "tok_emb_img__weight": (codes, width),
        "pos_emb_img__weight": (256, width),
        "head__weight": (codes, width),
    }
    tables |= {"sos__weight": (1000, width)} if by_class else {"sos": (1, 1, width)}
    conditions = "prior.conditions=[label]" if by_class else "prior.conditions=[]"
    tensors = tensors_of(gpt_layers(width, 42), **tables)
    found = fitted_to("imagenet_class_prior/prior", tensors, "prior.num_layers=42", conditions)
    assert found.network["num_classes"] == (1000 if by_class else None)


def test_a_position_of_igpt_moves_to_the_input_that_predicts_its_token():
    tables = {"position": torch.arange(6.0).reshape(3, 2), "class_embedding.weight": torch.ones(1, 1, 2)}
    moved = of_igpt(tables, {"num_classes": None})
    torch.testing.assert_close(moved["position"], torch.tensor([[0.0, 0], [0, 1], [2, 3]]))


@pytest.mark.parametrize(
    ("stage", "sizes", "parameters"),
    [
        ("glide_64_256/base", {"mult": ADM_64, "blocks": 3, "attention": (2, 4, 8)}, 385_030_726),
        (
            "glide_64_256/upsampler_256",
            {"mult": ADM_256, "blocks": 2, "attention": (8, 16, 32), "in_channels": 6},
            398_361_286,
        ),
    ],
)
def test_glide_fits_its_recipe_and_pads_with_the_last_word(stage: str, sizes: dict[str, Any], parameters: int):
    tables = {name: (128, 512) for name in ("positional_embedding", "padding_embedding")}
    layers = glide_layers(192, 16, words=50_257, text=512, out_channels=6, **sizes)
    tensors = tensors_of(layers, **tables)
    found = fitted_to(stage, tensors, words=words_of("a", *map(str, range(50_255)), "<|endoftext|>"))
    assert count(tensors) == parameters
    assert found.network["text"]["pad_id"] == 50_256
    assert found.settings["text_ids"] == {"begin": None, "end": None, "pad": 50_256}


def test_mindalle_s_transformer_fits_its_recipe_without_a_class_token():
    tables = mindalle_tables(1536, codes=16_384, words=16_384, texts=64, places=256)
    tensors = tensors_of(gpt_layers(1536, 42), **tables)
    found = fitted_to("mindalle_text_prior/prior", tensors, words=words_of("a", "[PAD]"))
    assert round(count(tensors) / 1e9, 1) == 1.3
    assert (found.network["class_token"], found.network["attend_padding"]) == (False, True)
    assert found.settings["text_ids"] == {"begin": None, "end": None, "pad": 1}
    assert len(found.tensors["position"]) == 255


def test_dit_fits_a_stage_of_its_sizes():
    """DiT-XL/2 at 256²; positions are the sinusoids of ours, or the file is refused."""
    network = "base.network={kind: dit, patch_size: 2, model_dim: 1152, num_layers: 28, num_heads: 16}"
    process = "{kind: discrete, schedule: linear, prediction_type: epsilon, variance: learned_range, loss: hybrid, "
    changes = [network, f"base.process={process}min_snr_gamma: null}}", "base.cond_drop_prob=0.1"]
    tensors = tensors_of(dit_layers(1152, 28, 2, 4), y_embedder__embedding_table__weight=(1001, 1152))
    tensors["pos_embed"] = grid_positions(16, dim=1152)[None]
    found = fitted_to("ldm_imagenet_f8/base", tensors, *changes)
    assert (count(tensors), found.network["num_classes"]) == (675_129_632, 1000)
    assert (found.settings["latent_scale"], found.settings["sampling"]["guided_channels"]) == (0.18215, 3)
    assert fitted_to("dit_imagenet_256/base", tensors).network == found.network
    with pytest.raises(ValueError, match="positions are not the sinusoids"):
        fitted_to("ldm_imagenet_f8/base", tensors | {"pos_embed": torch.zeros(1, 256, 1152)}, *changes)


def test_adm_of_edm_fits_the_sizes_of_adm_at_64():
    """`edm-imagenet-64x64-cond-adm`: a state of EDMPrecond; its buffers of resampling and augmentation are left out."""
    tensors = tensors_of(edm_layers(64, 192, ADM_64, 3, (32, 16, 8), 1000))
    more = {f"model.{name}": torch.empty(1) for name in ("enc.32x32_down.conv0.resample_filter", "map_augment.weight")}
    found = fitted_to("edm_imagenet_64/base", tensors | more)
    assert (count(tensors), found.recognized.left_out) == (295_899_267, 2)
    assert (found.network["num_classes"], found.network["null_label"]) == (1000, False)
    assert found.settings["objective"]["kind"] == "edm"


@pytest.mark.parametrize("labels", [0, 10])
def test_ddpm_plus_plus_of_edm_fits_its_recipe(labels: int):
    """`edm-cifar10-32x32-uncond-vp` and `-cond-vp`; NCSN++, `-ve`, has maps that ours lacks."""
    tensors = tensors_of(edm_layers(32, 128, (2, 2, 2), 4, (16,), labels, plus_plus=True))
    more = {f"model.{name}": torch.empty(1) for name in ("enc.16x16_down.conv0.resample_filter", "map_augment.weight")}
    conditions = ["base.conditions=[label]"] * bool(labels)
    found = fitted_to("edm_cifar_10/base", tensors | more, *conditions)
    assert count(tensors) == 55_733_891 - 9 * 128 + bool(labels) * 128 * (labels + 1)
    assert (found.network["num_classes"], found.recognized.family.title) == (labels or None, "DDPM++ of EDM")
    other = {"model.enc.16x16_aux_residual.weight": torch.empty(256, 3, 3, 3)}
    with pytest.raises(ValueError, match="aux_residual"):
        fitted_to("edm_cifar_10/base", tensors | other, *conditions)


def test_classes_of_ddpm_plus_plus_are_scaled_by_the_root_of_their_number():
    """The code multiplies the one-hot label by it; the bias belongs to every class."""
    table, bias = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0.5])
    found = edm.in_our_order({"class_embedding.weight": table, "class_embedding.bias": bias}, {})
    assert [*found] == ["class_embedding.weight"]
    assert found["class_embedding.weight"].flatten().tolist() == [2.5, 4.5, 6.5, 8.5]


def test_rows_of_edm_s_heads_and_columns_of_its_classes_come_into_our_order():
    rows = torch.arange(12.0)[:, None]  # of two heads of two features each, of which each has its query, key and value
    found = edm.in_our_order({"down.1.1.qkv.weight": rows, "class_embedding.weight": rows}, {"head_dim": 2})
    assert found["down.1.1.qkv.weight"].flatten().tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert found["class_embedding.weight"].shape == (1, 12)


@pytest.mark.parametrize("resolution", [64, 128])
def test_rows_of_heads_come_into_our_order_but_for_adm_64_which_has_it(resolution: int):
    network = {"low_res": False, "resample_in_blocks": True, "resolution": resolution, "head_dim": 2}
    rows = torch.arange(12.0)[:, None]  # two heads, of which each has two rows of queries, keys and values there
    (found,) = of_openai({"down.1.1.qkv.weight": rows}, network).values()
    moved = torch.tensor([0.0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])[:, None]
    torch.testing.assert_close(found, rows if resolution == 64 else moved)
