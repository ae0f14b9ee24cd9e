"""What a registered model is asked: a row of text and numbers, images in base64."""

import base64
import json
from typing import Any

import pydantic
import torch

from components.sampling.images import read_image
from components.sampling.requests import Request, nested_settings, read_size, stage_settings

IMAGES = ("image", "mask", "condition")


class RequestRow(pydantic.BaseModel):
    """One image; what is left out is the model's own choice."""

    label: str | None = None  # class name, or id as number or digits
    prompt: str | None = None
    seed: int | None = None
    generator: str | None = None  # by its name: diffusion, tokens, …
    guidance_scale: float | None = None
    steps: int | None = None
    sampler: str | None = None  # ddpm, ddim, dpm_solver_pp, sde_dpm_solver_pp, heun or euler
    classifier_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = None
    size: str | None = None  # HEIGHTxWIDTH of a larger image, of a transformer over tokens
    truncation: float | None = None
    sampling: str | None = None  # JSON, any sampling setting of any stage: {"upsampler_64": {"noise_level": 20}}
    image: str | None = None  # base64 of the image to work on
    mask: str | None = None  # base64 of its mask: white is to be made
    task: str | None = None  # inpainting, uncropping, colorization, jpeg or super_resolution
    condition: str | None = None  # base64 of the image that the model is conditioned on; its tokens, for a lone prior

    @pydantic.field_validator("label", "seed", "steps", "top_k", "best_of", mode="before")
    @classmethod
    def whole(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """A data frame with a gap in a column of integers holds floats; a class may come as its id."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value) if info.field_name == "label" and isinstance(value, int) else value

    @classmethod
    def of(cls, request: Request) -> "RequestRow":
        """The row that asks for it."""
        asked: dict[str, Any] = {name: value for name, value in request._asdict().items() if value not in (None, ())}
        asked |= {"size": "{}x{}".format(*asked["size"])} if "size" in asked else {}
        asked |= {"sampling": json.dumps(nested_settings(request.sampling))} if request.sampling else {}
        return cls(**asked | {name: base64.b64encode(asked[name]).decode() for name in IMAGES if name in asked})

    def request(self) -> Request:
        fields: dict[str, Any] = {name: value for name, value in self if value is not None and name in Request._fields}
        fields |= {name: base64.b64decode(fields[name]) for name in IMAGES if name in fields}
        fields |= {"size": read_size(fields["size"])} if "size" in fields else {}
        return Request(**fields | {"sampling": self.settings()})

    def settings(self) -> tuple[tuple[str, str, Any], ...]:
        """The sampling settings that the row changes. Raises ValueError for what is no such JSON."""
        try:
            return stage_settings(json.loads(self.sampling or "{}"))
        except json.JSONDecodeError as error:
            wanted = '{"upsampler_64": {"noise_level": 20}}'
            raise ValueError(f"sampling must be JSON such as {wanted}, not {self.sampling!r:.80}") from error

    def read_image(self, resolution: int) -> torch.Tensor:
        """The row's image, (3, resolution, resolution) in [-1, 1]. Raises ValueError if it has none."""
        if self.image is None:
            raise ValueError("this model needs an image: base64 of a PNG")
        return read_image(base64.b64decode(self.image), resolution=resolution)

    def text(self) -> str:
        """The row's prompt. Raises ValueError if it has none."""
        if self.prompt is None:
            raise ValueError("this model needs a prompt")
        return self.prompt
