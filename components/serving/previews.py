"""Which denoising steps of an image are shown on its way."""

from collections.abc import Mapping

from components.configuration.sampling import DiffusionSampling
from components.sampling.generator import Generator
from components.sampling.generators.diffusion import first_sampling
from components.sampling.model import sampling_of
from components.sampling.requests import Request

Shown = dict[tuple[str, int], int]  # (stage, step from 1) -> number of the preview from 0


def shown_steps(steps: Mapping[str, int], previews: int) -> Shown:
    """At most so many previews, evenly over all steps of all stages but the last one, which is the image itself."""
    every = [(stage, step) for stage, count in steps.items() for step in range(1, count + 1)]
    places = {round((number + 1) * len(every) / (previews + 1)) for number in range(previews)}
    inside = sorted(place for place in places if 1 <= place < len(every))
    return {every[place - 1]: number for number, place in enumerate(inside)}


def steps_of(maker: Generator, request: Request) -> dict[str, int]:
    """Denoising steps of each stage that shows them, in the order in which they come, for a checked request."""
    if not maker.shows_steps:
        return {}
    return {
        model.name: (first_sampling if model is maker.first else sampling_of)(model, request).steps_taken
        for model in maker.models
        if isinstance(model.sampling, DiffusionSampling)
    }
