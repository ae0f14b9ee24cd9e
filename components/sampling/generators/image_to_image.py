"""Image-to-image translation by a single model (Palette).

Tasks fill masks, add colors, and remove artifacts and blur.

Shapes: B plans, S = resolution.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from components.models.diffusion import samplers
from components.models.diffusion.degradation import MASK_TASKS, Degraded, denoise_in_mask, fill_mask
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.generators.diffusion import check_sampling, denoise, noise_of
from components.sampling.given_images import given_for_task
from components.sampling.image_files import gray_png
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, check_conditions
from components.sampling.requests import Request


@torch.no_grad()
def translate(model: SamplingModel, plans: Sequence[Plan], *, on_step: samplers.OnStep | None = None) -> Tensor:
    """Translates the images of plans with equal sampling settings to (B, 3, S, S) in [-1, 1].

    The known pixels of inpainting and uncropping stand before the network at every step, and come out as they came in
    (Saharia et al., 2022). Each plan has a task of its own.
    """
    noise = noise_of(model, plans)
    known, mask, filled = given_images(model, plans, noise(-1))
    made = denoise(
        model,
        plans,
        {"condition_image": Degraded(filled, mask).condition},
        noise,
        plans[0].of(model),
        on_step=on_step,
        around=partial(denoise_in_mask, known=known, mask=mask),
    )
    return torch.where(mask > 0, made, known)


def given_images(model: SamplingModel, plans: Sequence[Plan], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns known pixels (B, 3, S, S), masks (B, 1, S, S), and images with noise under the mask.

    The third tensor is (B, 3, S, S) too. Where a task changes every pixel the mask is all of the image, and what the
    network is shown has no noise.
    """
    given = [plan.given for plan in plans if plan.given is not None]
    known = torch.stack([each.known for each in given]).to(model.device)
    mask = torch.stack([each.mask for each in given]).to(model.device)
    filled = [
        fill_mask(image, where, drawn) if each.has_known else image
        for each, image, where, drawn in zip(given, known, mask, noise, strict=True)
    ]
    return known, mask, torch.stack(filled)


class ImageToImage(Generator):
    """An image with something missing -> an image-to-image model -> the image."""

    name, title = "translate", "Image to image"
    shows_steps = True

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        return model if model is not None and model.settings.get("role") == "image_to_image" else None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.first.settings["tasks"])

    def resolve(self, request: Request) -> Plan:
        given = given_for_task(self.first, request)
        check_conditions(self.first, request)
        plan = self.plan_of(request, given=given)
        check_sampling(self.first, plan.of(self.first))
        return plan

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        name = self.first.name
        return {name: translate(self.first, plans, on_step=hooks.of_stage(name))}

    def example(self) -> Request:
        settings = self.first.settings
        task, side = settings["tasks"][0], settings["resolution"]
        side = side // settings["super_resolution_factors"][0] if task == "super_resolution" else side
        mask = gray_png(side) if task in MASK_TASKS else None
        return super().example().replace(task=task, image=gray_png(side), mask=mask)
