"""Embeddings of texts and images: the contrastive encoder (CLIP), and the prior of DALL-E 2.

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; Ramesh et al.
2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents", section 2.2. A residual convolutional network
sees images, because it learns from thousands of images where a transformer wants millions.

Shapes: B batch, E embedding_dim, L text length, T text_dim, D model_dim of a transformer, C channels, H W pixels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.autoencoder import Downsample, ResBlock
from components.models.conditioned import embedded_time, embedding_mlp
from components.models.devices import autocast
from components.models.layers import PAD_ID, GroupNorm, TextTransformer
from components.models.token_network import Block

INITIAL_TEMPERATURE = 0.07
MAX_SCALE = 100.0  # of the similarities; above it training is unstable (Radford et al., 2021, section 2.5)


class EmbeddedText(NamedTuple):
    """A batch of texts: states of the tokens for the prior, and embeddings next to those of images."""

    states: Tensor  # (B, L, D)  one state a token, zeros at padding: a reader can tell
    embedding: Tensor  # (B, E)  of length 1


class Embeddings(NamedTuple):
    """Unit vectors of matching images and texts, and the logarithm of the factor of similarities."""

    image: Tensor  # (B, E)  of length 1, fp32, as the next
    text: Tensor  # (B, E)
    log_scale: Tensor  # ()  of what similarities are multiplied by: minus the logarithm of the temperature


class ContrastiveEncoder(nn.Module):
    """Images and texts as unit vectors, and the learned temperature of the similarities.

    Args:
        resolution: H = W; a multiple of patch_size * 2 ** (len(channel_mult) - 1), else ValueError.
        channels: channel_mult multiplies it for each level; every further level halves the sides.
        num_res_blocks: residual blocks of each level.
        patch_size: side of the patches that the first convolution makes one position each of.
        text: arguments of the TextTransformer.
        norm_groups: of every group norm; see `groups_of`."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        patch_size: int,
        embedding_dim: int,
        text: dict[str, Any],
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        factor = patch_size * 2 ** (len(channel_mult) - 1)
        if resolution % factor:
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, its patches and levels")
        self.resolution, self.embedding_dim = resolution, embedding_dim
        widths = [channels * mult for mult in channel_mult]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], patch_size, stride=patch_size)]
        for level, width in enumerate(widths):
            if level > 0:
                layers.append(Downsample(widths[level - 1]))
            before = [widths[max(level - 1, 0)], *[width] * (num_res_blocks - 1)]
            layers += [ResBlock(channels_in, out_channels=width, norm_groups=norm_groups) for channels_in in before]
        self.image_encoder = nn.Sequential(*layers, GroupNorm(widths[-1], norm_groups=norm_groups), nn.SiLU())
        self.image_projection = nn.Linear(widths[-1], embedding_dim, bias=False)
        self.text_encoder = TextTransformer(**text)
        self.text_projection = nn.Linear(text["model_dim"], embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def forward(self, image: Tensor, text: Tensor) -> Embeddings:  # (B, 3, H, W) in [-1, 1], (B, L) int64
        return Embeddings(self.encode_image(image), self.encode_text(text).embedding, self.log_scale)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E) of length 1, fp32 under autocast too."""
        return unit_vectors(self.image_projection, self.image_encoder(image).mean(dim=(2, 3)))

    def encode_text(self, text: Tensor) -> EmbeddedText:
        """Ids (B, L) int64 -> states and embedding. Raises ValueError when L exceeds the context length."""
        states, pooled = self.text_encoder(text)
        present = (text != PAD_ID)[..., None]  # (B, L, 1)
        return EmbeddedText(states.float() * present, unit_vectors(self.text_projection, pooled))

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Clip the temperature in the weights after each training step, so that a decrease stays possible."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))


def unit_vectors(projection: nn.Linear, features: Tensor) -> Tensor:
    """Features (B, C) projected to vectors (B, E) of length 1, in fp32 under autocast too."""
    with autocast(features.device, enabled=False):
        return F.normalize(projection(features.to(projection.weight.dtype)).float(), dim=-1)


def unit_variance(embedding: Tensor) -> Tensor:
    """Scale vectors (B, E) to length sqrt(E): components have a mean square of 1, like noise."""
    return F.normalize(embedding, dim=-1) * math.sqrt(embedding.shape[-1])


EXTRA_TOKENS = 4  # text embedding, time, noised image embedding, query


class DiffusionPrior(nn.Module):
    """Causal transformer from text, time and noised image embedding to the image embedding.
    The sequence is the text's states, the text's embedding, the time, the noised image embedding and a query, at whose
    place the output predicts the image embedding: x_0, or another target of the objective. A state of zeros is padding
    and is not looked at; model_dim is even and a multiple of num_heads."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        text_length: int,
        text_dim: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.model_dim, self.text_length = embedding_dim, model_dim, text_length
        self.states_in = nn.Linear(text_dim, model_dim)
        self.text_in = nn.Linear(embedding_dim, model_dim)
        self.time_mlp = embedding_mlp(model_dim, model_dim)
        self.image_in = nn.Linear(embedding_dim, model_dim)
        self.query = nn.Parameter(torch.zeros(model_dim))
        self.position_embedding = nn.Parameter(torch.zeros(text_length + EXTRA_TOKENS, model_dim))
        self.blocks = nn.ModuleList([Block(model_dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(model_dim)
        self.image_out = nn.Linear(model_dim, embedding_dim)
        for parameter in (self.query, self.position_embedding):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x_t: Tensor, time: Tensor, *, text_states: Tensor, text_embedding: Tensor) -> Tensor:
        """Return the prediction (B, E), fp32 under autocast too.
        The noised image embedding x_t and text_embedding are (B, E), of components with unit variance; time is (B,) and
        text_states (B, L, T), zeros at padding. Raises ValueError for a text of another length."""
        if text_states.shape[1] != self.text_length:
            raise ValueError(f"text_states of {text_states.shape[1]} tokens where {self.text_length} are needed")
        ends = [self.text_in(text_embedding), embedded_time(self.time_mlp, time), self.image_in(x_t)]
        ends.append(self.query.expand(x_t.shape[0], -1))
        x = torch.cat([self.states_in(text_states), torch.stack(ends, dim=1).to(text_states.dtype)], dim=1)
        x, mask = x + self.position_embedding, self.visible(text_states)
        for block in self.blocks:
            x = block(x, mask=mask)
        with autocast(x_t.device, enabled=False):
            return self.image_out(self.norm(x[:, -1].to(self.query.dtype)))

    def visible(self, text_states: Tensor) -> Tensor:
        """The mask (B, 1, S, S), S = L + 4: earlier positions without padding, and the own position."""
        length = self.text_length + EXTRA_TOKENS
        past = torch.ones(length, length, dtype=torch.bool, device=text_states.device).tril()
        present = nn.functional.pad((text_states != 0).any(-1), (0, EXTRA_TOKENS), value=True)  # (B, S)
        itself = torch.eye(length, dtype=torch.bool, device=text_states.device)
        return (past & present[:, None] | itself)[:, None]
