"""The whole cascade on disk and at work: two roads from a request to a picture.

    diffusion: base -> upsampler -> … -> picture
    tokens:    prior -> tokenizer's decoder -> picture

On disk it is a folder with one sub-folder for each model and `cascade.json`:
    {"stages": {"tokenizer": "tokenizer", "prior": "prior", "base": "base", "upsamplers": ["upsampler_64"]}}
A cascade may lack a road, or upsamplers. Imports only what the packed model of the registry carries.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from components.models.autoencoder import VQAutoencoder
from components.models.transformer import Transformer
from components.sampling.autoregressive import generate
from components.sampling.diffusion import sample_base, sample_upsampler
from components.sampling.model import SamplingModel, asked_or_set, check_conditions, encode_conditions, load_model
from components.sampling.requests import Request, check_request, random_stream

DESCRIPTION = "cascade.json"
OnStep = Callable[[str, int, int, Tensor, Tensor], None]  # (stage, step from 0, timestep, x_t, clipped x_0)
Pictures = dict[str, np.ndarray]  # stage -> uint8 (H, W, 3), in the order in which they were made


def compose(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    prior: Path | None = None,
    base: Path | None = None,
    upsamplers: Mapping[str, Path] | None = None,
) -> Path:
    """Copy the folders of trained models into `folder` as one cascade. Upsamplers go by stage name, smallest first."""
    single = {"tokenizer": tokenizer, "prior": prior, "base": base}
    stages: dict[str, str | list[str]] = {name: name for name, source in single.items() if source is not None}
    for name, source in {**single, **(upsamplers or {})}.items():
        if source is not None:
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
    description = {"stages": stages | {"upsamplers": list(upsamplers or {})}}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return folder


@dataclass(frozen=True)
class Cascade:
    """Loaded models, in fp32."""

    tokenizer: SamplingModel | None = None
    prior: SamplingModel | None = None
    base: SamplingModel | None = None
    upsamplers: tuple[SamplingModel, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError if the models don't fit each other."""
        made = self.base
        for upsampler in self.upsamplers:
            takes, makes = upsampler.settings["low_res_resolution"], made.settings["resolution"] if made else None
            if takes != makes:
                raise ValueError(f"{upsampler.name} enlarges {takes}² pictures, the stage before it makes {makes}²")
            made = upsampler

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> "Cascade":
        """Load a composed cascade. Raises ValueError if `folder` holds none."""
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise ValueError(f"{folder} holds no {DESCRIPTION}; give the folder of a composed cascade")
        stages = json.loads(path.read_text())["stages"]
        names = stages.pop("upsamplers", [])
        single = {name: load_model(name, path.parent / sub, device=device) for name, sub in stages.items()}
        return cls(**single, upsamplers=tuple(load_model(name, path.parent / name, device=device) for name in names))

    @property
    def roads(self) -> tuple[str, ...]:
        has_tokens = self.prior is not None and self.tokenizer is not None
        return (("diffusion",) if self.base else ()) + (("tokens",) if has_tokens else ())

    def check(self, request: Request) -> None:
        """Raise ValueError, in one line, if this cascade can't make the picture."""
        check_request(request)
        if request.road not in self.roads:
            raise ValueError(f"this cascade has no {request.road} road; it has {' and '.join(self.roads) or 'none'}")
        first = self.prior if request.road == "tokens" else self.base
        assert first is not None  # or it would not be one of the roads
        check_conditions(first, request)  # upsamplers enlarge what the base made and take of the request what they know
        if request.road == "tokens" or self.base is None:
            return
        limit = self.base.settings["schedule"]["num_train_timesteps"]
        if request.steps is not None and not 1 <= request.steps <= limit:
            raise ValueError(f"steps must be in [1, {limit}], not {request.steps}")

    def sample(
        self, requests: Sequence[Request], *, batch_size: int = 64, on_step: OnStep | None = None
    ) -> list[np.ndarray]:
        """One finished uint8 picture (H, W, 3) for each request, in their order.

        The same request gives the same picture, within one grey level, in whatever company.
        Raises ValueError, before any work, if a request can't be met; the message names it by its number from 1.
        """
        return [
            list(pictures.values())[-1]
            for pictures in self.sample_stages(requests, batch_size=batch_size, on_step=on_step)
        ]

    @torch.no_grad()
    def sample_stages(
        self, requests: Sequence[Request], *, batch_size: int = 64, on_step: OnStep | None = None
    ) -> list[Pictures]:
        """As `sample`, with the picture that each stage of the road made, the finished one last."""
        for number, request in enumerate(requests, 1):
            try:
                self.check(request)
            except ValueError as error:
                raise ValueError(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
        pictures: list[Pictures] = [{} for _ in requests]
        for batch in batches(requests, batch_size=batch_size):
            asked = [requests[index] for index in batch]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is meant, on a GPU too
                made = self._diffusion(asked, on_step) if asked[0].road == "diffusion" else self._tokens(asked)
            for stage, images in made.items():
                for index, picture in zip(batch, to_uint8(images), strict=True):
                    pictures[index][stage] = picture
        return pictures

    def _diffusion(self, requests: Sequence[Request], on_step: OnStep | None) -> dict[str, Tensor]:
        assert self.base is not None
        images = {"base": sample_base(self.base, requests, on_step=_of_stage(on_step, "base"))}
        for model in self.upsamplers:
            low_res = list(images.values())[-1]
            images[model.name] = sample_upsampler(model, requests, low_res, on_step=_of_stage(on_step, model.name))
        return images

    def _tokens(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        assert self.prior is not None
        assert self.tokenizer is not None
        tokens = sample_prior(self.prior, requests)  # (B, h, w)
        decoder = self.tokenizer.module
        assert isinstance(decoder, VQAutoencoder)
        return {"tokenizer": decoder.detokenize(tokens.to(self.tokenizer.device))}


def sample_prior(model: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Tokens (B, h, w) of requests that share guidance_scale, temperature, top_k and top_p."""
    first, settings = requests[0], model.settings
    condition, null = encode_conditions(model, requests)
    assert isinstance(model.module, Transformer)
    tokens = generate(
        model.module,
        generators=[random_stream(request.seed, model.name) for request in requests],
        label=condition.get("label"),
        text=condition.get("text"),
        null_text=null["text"][0] if "text" in null else None,
        guidance_scale=asked_or_set(first.guidance_scale, settings, "guidance_scale", 1.0),
        temperature=asked_or_set(first.temperature, settings, "temperature", 1.0),
        top_k=asked_or_set(first.top_k, settings, "top_k", None),
        top_p=asked_or_set(first.top_p, settings, "top_p", None),
    )
    height, width = settings["grid"]
    return rearrange(tokens, "b (h w) -> b h w", h=height, w=width)


def batches(requests: Sequence[Request], *, batch_size: int) -> Iterable[list[int]]:
    """Places of requests that can be sampled together, at most batch_size of them. Raises ValueError below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    ways: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        ways.setdefault(request.way(), []).append(index)
    for indices in ways.values():
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """Images (B, 3, H, W) in [-1, 1] as pictures (H, W, 3), rounded."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(rearrange(levels, "b c h w -> b h w c").cpu().numpy())


def _of_stage(on_step: OnStep | None, stage: str) -> Callable[[int, int, Tensor, Tensor], None] | None:
    if on_step is None:
        return None
    return lambda step, timestep, x_t, x_0: on_step(stage, step, timestep, x_t, x_0)
