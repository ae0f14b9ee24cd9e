"""Common parts of diffusion networks: conditions by name, embeddings, and tokens for attention.
Shapes: B batch, D embedding size, L tokens, E features of a token, H W height and width, P patch_size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from components.models.devices import autocast
from components.models.layers import TextTransformer, timestep_embedding


class ImageTokens(nn.Module):
    """Patch embedding, normalized (Dosovitskiy et al., 2021, equation 1, without positions).
    Their places come from attention. `nowhere`: other tokens have no place; else that of the first patch, as in models
    of before. The image has H = W = resolution, or ValueError unless patches divide it."""

    def __init__(self, *, channels: int, resolution: int, patch_size: int, token_dim: int, nowhere: bool) -> None:
        super().__init__()
        self.nowhere = nowhere
        if resolution % patch_size:
            raise ValueError(f"resolution {resolution} is not a multiple of image_patch_size {patch_size}")
        self.grid = resolution // patch_size
        self.patches = nn.Conv2d(channels, token_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, image: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, L, E)
        return self.norm(rearrange(self.patches(image), "b e h w -> b (h w) e"))


class Context(NamedTuple):
    """Tokens next to the image, seen by the image's attention."""

    states: Tensor  # (B, L, E)
    visible: Tensor  # (B, L)  bool, True where a token may be seen; in every row at least one
    grid: int = 0  # the last grid * grid tokens are patches of a square image, row by row
    nowhere: bool = False  # tokens before them are seen alike from every place


class ConditionedNetwork(nn.Module):
    """Embeddings of the time and of the conditions, a base class for networks.

    Args:
        embedding_dim: D.
        frequency_dim: size of the sinusoidal embedding of times and noise levels, even.
        in_channels: of x_t.
        out_channels: of the prediction, and of v each if there is one.
        learned_variance: the output is twice as wide, (prediction, v), where v in [-1, 1] places the log-variance
            between that of the posterior and log beta (Nichol and Dhariwal, 2021, equation 15).
        num_classes: adds a class table.
        null_label: that table has one more row, the label `num_classes`, which stands for no label.
        class_token_dim: the label is a token of so many features for the attention instead of a part of the embedding
            (Rombach et al., 2022).
        class_in_frequencies: the label is added to the sinusoidal embedding of the time (Karras et al., 2022, code).
        text: arguments of a TextTransformer that is trained along.
        text_states_dim: E of the states that an encoder outside makes; instead of `text`.
        pool_text: add the projected text to the embedding: the pooled state of the own encoder, the mean of the states
            of one outside (Saharia et al., 2022).
        image_embedding_dim: size of an embedding of an image, projected and added to the embedding (Ramesh et al.,
            2022).
        condition_image_channels: channels of an image that is concatenated to x_t, 0 for none.
        image_tokens: arguments of ImageTokens but for the channels: that image is seen as tokens instead.
        low_res: concatenates a low-resolution image to x_t.
        embed_noise_level: embed the noise level of that image. Without, the network takes it and doesn't look at it,
            as the upsamplers of ADM and GLIDE, which know no noise.
        frequency_shift, sines_first: of the embedding of times and noise levels, see `timestep_embedding`.

    Raises ValueError if `text` and `text_states_dim` are both given, `class_token_dim` without classes, or
    `image_tokens` without the channels of an image."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        frequency_dim: int,
        in_channels: int = 3,
        out_channels: int = 3,
        learned_variance: bool = False,
        num_classes: int | None = None,
        null_label: bool = True,
        class_token_dim: int | None = None,
        class_in_frequencies: bool = False,
        text: dict[str, Any] | None = None,
        text_states_dim: int | None = None,
        pool_text: bool = True,
        image_embedding_dim: int | None = None,
        condition_image_channels: int = 0,
        image_tokens: dict[str, Any] | None = None,
        low_res: bool = False,
        embed_noise_level: bool = True,
        frequency_shift: int = 0,
        sines_first: bool = False,
    ) -> None:
        super().__init__()
        if text is not None and text_states_dim is not None:
            raise ValueError("give either text or text_states_dim: one encoder of text is enough")
        if class_token_dim is not None and num_classes is None:
            raise ValueError("class_token_dim needs num_classes")
        if image_tokens is not None and condition_image_channels == 0:
            raise ValueError("tokens of a condition image need condition_image_channels")
        self.num_classes = num_classes
        self.frequencies: dict[str, Any] = {"shift": frequency_shift, "sines_first": sines_first}
        self.class_is_token, self.class_in_frequencies = class_token_dim is not None, class_in_frequencies
        self.text_dim = text_states_dim if text is None else int(text["model_dim"])
        self.concatenates = ("low_res", "condition_image") if image_tokens is None else ("low_res",)
        self.input_channels = in_channels * (2 if low_res else 1)
        self.input_channels += condition_image_channels if image_tokens is None else 0
        self.output_channels = out_channels * (2 if learned_variance else 1)
        # What must be given, no more and no less, but for a noise level that is not looked at.
        wanted = {
            "label": num_classes is not None,
            "text": text is not None,
            "text_states": text_states_dim is not None,
            "low_res": low_res,
            "noise_level": low_res and embed_noise_level,
            "condition_image": condition_image_channels > 0,
            "image_embedding": image_embedding_dim is not None,
        }
        self.conditions = tuple(name for name, needed in wanted.items() if needed)
        self.ignored = ("noise_level",) if low_res and not embed_noise_level else ()

        # The order in which modules are made decides their initial weights: new ones come after those that were here.
        self.time_mlp = embedding_mlp(frequency_dim, embedding_dim)
        rows = None if num_classes is None else num_classes + int(null_label)
        width = frequency_dim if class_in_frequencies else class_token_dim or embedding_dim
        self.class_embedding = None if rows is None else nn.Embedding(rows, width)
        self.text_encoder = None if text is None else TextTransformer(**text)
        pooled = self.text_dim if pool_text else None
        self.text_projection = None if pooled is None else nn.Linear(pooled, embedding_dim)
        self.noise_level_mlp = embedding_mlp(frequency_dim, embedding_dim) if "noise_level" in self.conditions else None
        wide = image_embedding_dim
        self.image_embedding_projection = None if wide is None else nn.Linear(wide, embedding_dim)
        tokens = image_tokens
        self.image_tokens = None if tokens is None else ImageTokens(channels=condition_image_channels, **tokens)

    def checked(self, x_t: Tensor, conditions: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The given conditions, by name.
        Raises ValueError if one is missing, is one that the network was not built for, or has another size."""
        present = {name: value for name, value in conditions.items() if value is not None}
        for name in self.conditions:
            if name not in present:
                raise ValueError(f"this network is conditioned on {name}")
        for name in present:
            if name not in (*self.conditions, *self.ignored):
                raise ValueError(f"this network is not conditioned on {name}")
        for name in ("low_res", "condition_image"):
            if name in present and present[name].shape[2:] != x_t.shape[2:]:
                sizes = [" x ".join(map(str, image.shape[2:])) for image in (present[name], x_t)]
                raise ValueError(f"{name} has {sizes[0]} pixels, x_t has {sizes[1]}")
        return present

    def concatenated(self, x_t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Concatenate x_t with the images among the conditions: (B, input_channels, H, W).
        Raises ValueError if together they have other channels than the network was built for."""
        images = [conditions[name] for name in self.concatenates if name in conditions]
        x = torch.cat([x_t, *images], dim=1) if images else x_t
        if x.shape[1] != self.input_channels:
            channels = " + ".join(str(image.shape[1]) for image in (x_t, *images))
            raise ValueError(f"x_t and its images have {channels} channels, this network takes {self.input_channels}")
        return x

    def embed(self, time: Tensor, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Context | None]:
        """Sum of the embeddings of time and conditions without images, (B, D), and attention's tokens."""
        label = None if self.class_embedding is None else self.class_embedding(conditions["label"])
        offset = label if self.class_in_frequencies else None
        embedding = embedded_time(self.time_mlp, time, offset, **self.frequencies)
        if label is not None and not (self.class_is_token or self.class_in_frequencies):
            embedding = embedding + label
        context, pooled = self.read_text(conditions)
        if pooled is not None and self.text_projection is not None:
            embedding = embedding + self.text_projection(pooled)
        if self.noise_level_mlp is not None:
            level = conditions["noise_level"]
            embedding = embedding + embedded_time(self.noise_level_mlp, level, **self.frequencies)
        if self.image_embedding_projection is not None:
            embedding = embedding + self.image_embedding_projection(conditions["image_embedding"])
        if self.class_is_token and label is not None:
            context = with_tokens(context, label[:, None])
        if self.image_tokens is not None:
            context = with_tokens(context, self.image_tokens(conditions["condition_image"]))
            context = context._replace(grid=self.image_tokens.grid, nowhere=self.image_tokens.nowhere)
        return embedding, context

    def read_text(self, conditions: Mapping[str, Tensor]) -> tuple[Context | None, Tensor | None]:
        """The states of the text, encoded here or given, where zeros are padding, and a pooled state (B, E)."""
        if self.text_encoder is not None:
            states, pooled = self.text_encoder(conditions["text"])
            return Context(states, self.text_encoder.visible(conditions["text"])), pooled
        if self.text_dim is None:
            return None, None
        states = conditions["text_states"]
        visible = (states != 0).any(-1)  # (B, L)
        visible[:, 0] = True  # a softmax over nothing would be NaN
        pooled = (states * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
        return Context(states, visible), pooled


def with_tokens(context: Context | None, tokens: Tensor) -> Context:
    """Append tokens (B, L, E), visible in every row, to the tokens of the context."""
    visible = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if context is None:
        return Context(tokens, visible)
    return Context(torch.cat([context.states, tokens], dim=1), torch.cat([context.visible, visible], dim=1))


def embedding_mlp(dim: int, embedding_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


def embedded_time(mlp: nn.Sequential, time: Tensor, offset: Tensor | None = None, **frequencies: Any) -> Tensor:
    """Embedding (B, D) of times or noise levels (B,) by an MLP, in fp32 under autocast too.
    Neighboring times differ by less than a rounding of bf16. An offset is added to what the MLP sees. `frequencies`:
    see `timestep_embedding`."""
    first = mlp[0]
    assert isinstance(first, nn.Linear)
    with autocast(time.device, enabled=False):
        seen = timestep_embedding(time, first.in_features, **frequencies).to(first.weight.dtype)
        return mlp(seen if offset is None else seen + offset)
