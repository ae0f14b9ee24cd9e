"""U-Nets of openai/glide-text2im by text: base and upsampler (Nichol et al., 2022).

Their U-Net has the names of guided-diffusion; beside it stand a transformer over the text, whose last state joins the
embedding of the time, and keys and values of the text in every attention. All projections of attention have heads
outermost, (heads, 3, d) and (heads, 2, d). A pad is the last word of the vocabulary; token 0 is a word. Base and
upsampler differ in sizes and in the upsampler's input; models for inpainting have inputs that ours lack."""

from einops import rearrange
from torch import Tensor

from components.weights.families.unets import heads, openai_rules
from components.weights.renaming import Arguments, Rules, WeightFamily, queries_outermost

TEXT = "text_encoder."


def rules(network: Arguments) -> Rules:
    """Names of guided-diffusion, of the attention to text, and of the transformer over the text."""
    return [
        (r"^transformer\.resblocks\.", f"{TEXT}blocks."),
        (r"^(token_embedding\.|padding_embedding$)", rf"{TEXT}\1"),
        (r"^positional_embedding$", f"{TEXT}position_embedding"),
        (r"^final_ln\.", f"{TEXT}norm."),
        (r"^transformer_proj\.", "text_projection."),
        (r"\.attn\.c_(qkv|proj)\.", r".\1."),
        (r"\.ln_1\.", ".attention_norm."),
        (r"\.ln_2\.", ".mlp.0."),
        (r"\.mlp\.c_fc\.", ".mlp.1."),
        (r"\.mlp\.c_proj\.", ".mlp.3."),
        (r"\.encoder_kv\.", ".context_kv."),
        *openai_rules(network),
    ]


def in_our_order(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Rows of attention's projections with queries, keys and values outermost."""
    adapted = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            own = network["text"]["num_heads"] if name.startswith(TEXT) else heads(network, channels=len(tensor) // 3)
            adapted[name] = queries_outermost(tensor, num_heads=own)
        elif ".context_kv." in name:
            own = heads(network, channels=len(tensor) // 2)
            adapted[name] = rearrange(tensor, "(heads two d) ... -> (two heads d) ...", two=2, heads=own)
    return adapted


GLIDE = WeightFamily(
    "U-Net of GLIDE",
    kinds=("unet",),
    marks=("time_embed.0.weight", "transformer.resblocks.0.attn.c_qkv.weight", "padding_embedding"),
    rules=rules,
    adapted=in_our_order,
    text_tables=("token_embedding.weight", "positional_embedding"),
    pad="<|endoftext|>",
)
