"""A base model's images under one kind of guidance: without condition, by a weaker model, or by a classifier."""

from collections.abc import Sequence

from torch import Tensor

from components.models.diffusion.guidance import guide
from components.models.diffusion.samplers import sample
from components.sampling.classifier import classifier_score
from components.sampling.generators.diffusion import noise_of, objective_of, sampling_arguments
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, encode_conditions


def sample_guided(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    scale: float,
    weaker: SamplingModel | None = None,
    classifier: SamplingModel | None = None,
    unconditional: bool = False,
    interval: tuple[float, float] | None = None,
) -> Tensor:
    """Images (B, C, H, W) of plans that share sampler and steps (those of the first one count).

    Args:
        scale: of the guidance: 0 is none by a classifier, 1 is none otherwise.
        weaker: takes the place of the model without condition (autoguidance; Karras et al., 2024).
        classifier: of noisy images; its gradient towards each plan's label guides (Dhariwal and Nichol, 2021).
        interval: guide at these noise levels only, sigma / signal (Kynkäänniemi et al., 2024).
        unconditional: with a classifier, the model itself is told no condition.

    The same plan gives the same image in whatever batch.
    """
    objective = objective_of(model)
    condition, null = encode_conditions(model, plans)
    noise, score, branches = noise_of(model, plans), None, scale
    if classifier is not None:
        branches = 1.0  # the network runs on one condition alone
        score = classifier_score(classifier, condition["label"], scale) if scale != 0 else None
    return sample(
        guide(
            objective,
            model.module,
            null if unconditional else condition,
            null,
            branches,
            weaker=None if weaker is None else weaker.module,
            interval=interval,
        ),
        objective,
        noise(-1),
        noise=noise,
        score=score,
        **sampling_arguments(plans[0].of(model)),
    )
