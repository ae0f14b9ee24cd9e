"""Diffusion prior of DALL-E 2: from a text to the embedding of a matching image.

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents", section 2.2.

Shapes: B batch, E embedding_dim, L text_length, T text_dim, D model_dim.
"""

import torch
from torch import Tensor, nn

from components.models.autocast import autocast
from components.models.blocks import Block
from components.models.layers import timestep_embedding

EXTRA_TOKENS = 4  # text embedding, time, noised image embedding, query


class DiffusionPrior(nn.Module):
    """Causal transformer from text, time and noised image embedding to the image embedding.

    The sequence is the text's states, the text's embedding, the time, the noised image embedding and a query, at whose
    place the output predicts the image embedding: x_0, or another target of the objective.

    Args:
        embedding_dim: E, of text and image.
        text_length: L, of every text.
        text_dim: T, of the states of its tokens; a state of zeros is padding and is not looked at.
        model_dim: D, even and a multiple of num_heads.
    """

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
        self.time_mlp = nn.Sequential(nn.Linear(model_dim, model_dim), nn.SiLU(), nn.Linear(model_dim, model_dim))
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

        Args:
            x_t: (B, E), the noised image embedding, of components with unit variance.
            time: (B,).
            text_states: (B, L, T), zeros at padding.
            text_embedding: (B, E), of components with unit variance.

        Raises ValueError for a text of another length.
        """
        if text_states.shape[1] != self.text_length:
            raise ValueError(f"text_states of {text_states.shape[1]} tokens where {self.text_length} are needed")
        frequencies = timestep_embedding(time, self.model_dim).to(self.query.dtype)
        ends = [self.text_in(text_embedding), self.time_mlp(frequencies), self.image_in(x_t)]
        ends.append(self.query.expand(len(x_t), -1))
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
