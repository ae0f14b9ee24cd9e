"""U-Nets of openai/glide-text2im by text: base and upsampler (Nichol et al., 2022).

Their U-Net has the names of guided-diffusion; beside it stand a transformer over the text, whose last state joins the
embedding of the time, and keys and values of the text in every attention. All projections of attention have heads
outermost, (heads, 3, d) and (heads, 2, d). A pad is the last word of the vocabulary; token 0 is a word. Base and
upsampler differ in sizes and in the upsampler's input; models for inpainting have inputs that ours lack."""

from einops import rearrange
from torch import Tensor

from components.weights.families.unets import OPENAI, heads
from components.weights.renaming import Arguments, WeightFamily, queries_outermost, segments

NAMES = segments("""
    transformer.resblocks=text_encoder.blocks
    token_embedding=text_encoder.token_embedding
    padding_embedding=text_encoder.padding_embedding
    positional_embedding=text_encoder.position_embedding
    final_ln=text_encoder.norm
    transformer_proj=text_projection
    attn.c_qkv=qkv attn.c_proj=proj
    ln_1=attention_norm ln_2=mlp.0
    mlp.c_fc=mlp.1 mlp.c_proj=mlp.3
    encoder_kv=context_kv
""")


def in_our_order(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Rows of attention's projections with queries, keys and values outermost."""
    adapted = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            of_text = name.startswith("text_encoder.")
            own = network["text"]["num_heads"] if of_text else heads(network, channels=len(tensor) // 3)
            adapted[name] = queries_outermost(tensor, num_heads=own)
        elif ".context_kv." in name:
            own = heads(network, channels=len(tensor) // 2)
            adapted[name] = rearrange(tensor, "(heads two d) ... -> (two heads d) ...", two=2, heads=own)
    return adapted


GLIDE = WeightFamily(
    "U-Net of GLIDE",
    kind="unet",
    marks=("time_embed.0.weight", "transformer.resblocks.0.attn.c_qkv.weight", "padding_embedding"),
    names=[*NAMES, *OPENAI.names],
    adapted=in_our_order,
    text_tables=("token_embedding.weight", "positional_embedding"),
    pad="<|endoftext|>",
)
