"""CLIP under open_clip's names, as a CLIPModel of transformers.

A hub's folder of open_clip holds `open_clip_config.json` beside the weights. It says what no shape tells: heads, GELU
or QuickGELU, means and deviations of the images. Read are models of a plain ViT and CLIP's own text transformer (those
of LAION and DataComp, and OpenAI's), none with towers of other libraries (SigLIP, ConvNeXt, EVA), ResNets or CoCa.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from components.configuration.config import refuse
from components.runtime.storage.store import Store
from components.weights.files import WeightsFile, read_config
from components.weights.renaming import Rules, new_name, segments

STATED, MARK = "open_clip_config.json", "visual.conv1.weight"
NAMES: Rules = [
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # as transformers spells it
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^text_projection$", "text_projection.weight"),
    *segments("ln_final=text_model.final_layer_norm ln_1=layer_norm1 ln_2=layer_norm2"),
    *segments("attn=self_attn c_fc=fc1 c_proj=fc2"),
]
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")  # from rows there
FIELDS = {  # that are read, by part of the configuration
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
USUAL = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}  # of images, as CLIP's own


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of open_clip by the names of transformers, with queries, keys and values apart."""
    renamed = {new_name(name, NAMES): own for name, own in tensors.items() if name != "attn_mask"}
    for name in [name for name in renamed if ".in_proj_" in name]:
        for part, own in zip("qkv", renamed.pop(name).chunk(3), strict=True):
            renamed[name.replace("in_proj_", f"{part}_proj.")] = own
    return renamed | {name: renamed[name].T.contiguous() for name in PROJECTIONS if name in renamed}


def as_clip_model(file: WeightsFile, folder: str) -> tuple[WeightsFile, dict[str, Any]]:
    """The file of a CLIPModel in fp32 for a file of open_clip, and the scaling of images.
    `folder`: of its configuration, which may say mean and deviation. Raises ValueError, in one line, for one that is
    missing or of another model."""
    stated = read_config(Store(folder), STATED)
    images = stated.get("preprocess_cfg") or {}
    other = [name for name, usual in USUAL.items() if images.get(name, usual) != usual]
    refuse(other, f"{STATED} has preprocess_cfg.{''.join(other[:1])}, other than CLIP's own")
    scaling = {name: images[name] for name in ("mean", "std") if images.get(name)}
    tensors = {name: own.float() for name, own in clip_tensors(file.tensors).items()}
    return file._replace(tensors=tensors, config=clip_config(stated)), scaling


def clip_config(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of transformers for that of open_clip.
    Raises ValueError, in one line, for a field that a CLIPModel knows nothing of, and for one that is missing."""
    try:
        model = stated["model_cfg"]
        vision, text = parts = model["vision_cfg"], model["text_cfg"]
        for name, own in zip(FIELDS, (model, *parts), strict=True):
            other = [field for field in own if field not in FIELDS[name] and own[field] not in (None, False)]
            refuse(other, f"{STATED} has {name}.{''.join(other[:1])}: read are a plain ViT and CLIP's text transformer")
        refuse(not isinstance(vision["layers"], int), f"{STATED} has a ResNet: read are models of a plain ViT")
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        vision_heads = vision["width"] // (vision.get("head_width") or 64)
        sizes = {name: vision[name] for name in ("image_size", "patch_size")}
        # A text is read where its token has the highest number, as transformers does for an end of 2.
        words = {
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 2,
        }
        towers = {}
        for name, own, heads, more in (("vision", vision, vision_heads, sizes), ("text", text, text["heads"], words)):
            width, ratio = own["width"], own.get("mlp_ratio") or 4.0
            towers[f"{name}_config"] = {
                "hidden_size": width,
                "intermediate_size": int(width * ratio),
                "hidden_act": act,
                "num_hidden_layers": own["layers"],
                "num_attention_heads": heads,
                **more,
            }
        return {"model_type": "clip", "projection_dim": model["embed_dim"], **towers}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{STATED} is not whole: {error!r}") from None
