"""Guidance: classifier-free (Ho and Salimans, 2022), by a weaker network, and by a classifier.
Sources of the latter two: Karras et al. (2024), and Dhariwal and Nichol (2021).
Shapes: B batch; outputs are (B, C, H, W), or (B, 2 C, H, W) where the variance is learned."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from components.models.diffusion.objective import Network, Objective
from components.models.diffusion.samplers import Denoise, Score

Scale = float | Tensor  # a number for all samples, or (B,) with a number for each sample


def guide(
    objective: Objective,
    network: Network,
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    guidance_scale: Scale | Mapping[str, Scale],
    *,
    weaker: Network | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoise:
    """Bind conditions and guidance: output = unconditional + scale * (conditional - unconditional).
    At most the first C channels are guided; a learned variance comes from the conditional output alone.

    Args:
        condition: each value (B, ...).
        null: the null values (B, ...) of the guided conditions, under the keys of `condition`; a key that is missing
            here, such as low_res, has the same value in every branch.
        guidance_scale: a number, or one for each sample (B,); when all are 1 the network runs once a step instead of on
            a doubled batch. Papers that write (1 + w) mean guidance_scale = 1 + w. With a scale for each of several
            conditions each is guided alone, and the differences are summed (Liu et al., 2022): unconditional + sum of
            scale_i * (conditional_i - unconditional); a condition without a scale is never null.
        weaker: a smaller or less trained network with the same conditions, in place of the unconditional branch:
            weaker + scale * (network - weaker).
        interval: guide only where sigma / signal lies in [low, high] (Kynkäänniemi et al., 2024); elsewhere scale is 1.
        rescale: in [0, 1], how far the deviation of the guided output is brought back to the deviation of the
            conditional output (Lin et al., 2024, equations 15 and 16).
        channels: so many are guided, the rest is the conditional output's; None: all. Peebles and Xie (2023): 3 of 4.

    Raises ValueError if null has a key that condition lacks, guidance_scale a key that null lacks, or scales by
    condition are combined with weaker or rescale."""
    if not null.keys() <= condition.keys():
        raise ValueError(f"null conditions without a condition: {', '.join(sorted(null.keys() - condition.keys()))}")
    if isinstance(guidance_scale, Mapping) and (rescale > 0 or weaker is not None):
        raise ValueError("rescale and weaker take one guidance_scale, not one for each condition")
    branches, scales = _branches(condition, null, guidance_scale)
    nothing = not scales or (weaker is None and not null)
    if nothing or (len(scales) == 1 and bool((scales[0] == 1).all())):
        return partial(objective.apply, network, **condition)

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        """The guided output; outside the interval that of the condition alone."""
        if interval is not None:  # all samples have a common time
            signal, sigma = objective.levels(time[:1], x_t.new_zeros(1, dtype=torch.float64))
            if not bool((sigma >= interval[0] * signal) & (sigma <= interval[1] * signal)):
                return objective.apply(network, x_t, time, **condition)
        if weaker is None:
            # The outputs of all branches, by a single run on a concatenated batch.
            together = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
            x, times = torch.cat([x_t] * len(branches)), torch.cat([time] * len(branches))
            *conditional, reference = objective.apply(network, x, times, **together).chunk(len(branches))
        else:
            conditional = [objective.apply(network, x_t, time, **condition)]
            reference = objective.apply(weaker, x_t, time, **condition)
        first = min(x_t.shape[1], channels or x_t.shape[1])
        guided = _extrapolated([output[:, :first] for output in conditional], reference[:, :first], scales)
        if rescale > 0:
            deviations = [x.std(dim=(1, 2, 3), keepdim=True) for x in (conditional[0][:, :first], guided)]
            guided = guided * (rescale * (deviations[0] / deviations[1]) + (1 - rescale))
        return torch.cat([guided, conditional[0][:, first:]], dim=1)

    return denoise


def classifier_score(objective: Objective, classifier: Network, label: Tensor, scale: Scale) -> Score:
    """Return the gradient at x_t of scale * log p(label | x_t), for the argument `score` of `sample`.
    Source: Dhariwal and Nichol (2021), section 4. The classifier is called by the objective like a network, without
    conditions: noisy images -> logits (B, classes). `label` is (B,) int64; a scale of 0 is no guidance."""

    def score(x_t: Tensor, time: Tensor) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            log_probabilities = objective.apply(classifier, x_t, time).log_softmax(dim=1)
            chosen = log_probabilities.gather(1, label[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x_t)
        return torch.as_tensor(scale).to(gradient).reshape(-1, 1, 1, 1) * gradient

    return score


def _branches(
    condition: Mapping[str, Tensor], null: Mapping[str, Tensor], guidance_scale: Scale | Mapping[str, Scale]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The inputs of each branch, the unconditional branch last, and the scale (1 or B,) of the rest."""
    full = dict(condition)
    if not isinstance(guidance_scale, Mapping):
        return [full, full | dict(null)], [torch.as_tensor(guidance_scale, dtype=torch.float32)]
    unknown = sorted(guidance_scale.keys() - null.keys())
    if unknown:
        raise ValueError(f"guidance_scale of what is no guided condition: {', '.join(unknown)}")
    nothing = full | {name: null[name] for name in guidance_scale}
    alone = [nothing | {name: condition[name]} for name in guidance_scale]
    return [*alone, nothing], [torch.as_tensor(scale, dtype=torch.float32) for scale in guidance_scale.values()]


def _extrapolated(conditional: list[Tensor], reference: Tensor, scales: list[Tensor]) -> Tensor:
    weights = [scale.to(reference).reshape(-1, 1, 1, 1) for scale in scales]
    if len(conditional) == 1:
        # The same formula, in a form that gives a sample of scale 1 exactly the conditional prediction.
        return conditional[0] + (weights[0] - 1) * (conditional[0] - reference)
    added = [weight * (output - reference) for weight, output in zip(weights, conditional, strict=True)]
    return reference + torch.stack(added).sum(dim=0)
