"""A model of diffusion as a pipeline of diffusers: this file and a program are all that is needed.

`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` makes a `ProgramPipeline`. The numbers of each step
stand in the config.json beside the program. Steps are those of DDIM without noise (Song et al., 2021, equation 12),
which at any levels are Euler's (Karras et al., 2022).

Shapes: B images, C channels, H W height and width."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

PROGRAM = "network.pt2"


class ProgramModel(ModelMixin, ConfigMixin):
    """A file of torch.export as a model of diffusers."""

    config_name = "config.json"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "ProgramModel":
        """Opens the program in a local folder; other arguments of diffusers mean nothing to a program."""
        model, folder = cls(), Path(pretrained_model_name_or_path)
        model.register_to_config(**json.loads((folder / cls.config_name).read_text()))
        model.network = torch.export.load(folder / PROGRAM).module()
        return model

    def forward(self, x_t: Tensor, time: float, conditions: dict[str, Tensor]) -> Tensor:
        """The network's output (B, C, H, W) for x_t at a time; of a learned variance the prediction alone."""
        names = [*self.config["inputs"]][2:]
        if set(names) != set(conditions):
            raise ValueError(f"this model takes {', '.join(names) or 'no conditions'}, not {', '.join(conditions)}")
        output = self.network(x_t, torch.full((len(x_t),), time), *(conditions[name] for name in names))
        return output[:, : x_t.shape[1]]


class ProgramPipeline(DiffusionPipeline):
    """Sampling by a program."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        null: dict[str, Tensor] | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or latents, of standard normal noise of that shape.

        Args:
            noise: in place of a generator's.
            guidance_scale: of guidance without a classifier; 1 is none.
            null: the null values of the guided conditions; a label has its own.
            conditions: each (B, ...), by name.
        """
        config = self.denoiser.config
        shape, nothing = config["inputs"]["x_t"][2:], dict(null or {})
        if "label" in conditions and config["null_label"] is not None:
            nothing.setdefault("label", torch.full_like(conditions["label"], config["null_label"]))
        x = torch.randn(batch_size, *shape, generator=generator) if noise is None else noise
        x = config["initial_scale"] * x
        for step in config["steps"]:
            seen = step["scale"] * x
            output = self.denoiser(seen, step["time"], conditions)
            if guidance_scale != 1:
                other = self.denoiser(seen, step["time"], conditions | nothing)
                output = output + (guidance_scale - 1) * (output - other)
            x_0 = step["of_x_t"] * x + step["of_output"] * output
            x_0 = x_0.clamp(-1, 1) if config["clip_sample"] else x_0
            x = step["next_signal"] * x_0 + step["next_sigma"] * (x - step["signal"] * x_0) / step["sigma"]
        return x
