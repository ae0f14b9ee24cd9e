"""Optimization: optimizers, warm-up and decay, scheduled loss weights, averages, a guard against NaN.

A power-function EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3
and appendix C) of width s (sigma_rel) looks back over a share of training, however long: it weighs the weights after
update k in proportion to k^gamma. Two are tracked, of widths 0.05 and 0.10, and stored now and then as snapshots; a
linear combination of N snapshots is the average of any width, to be chosen after training."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from components.configuration.config import refuse
from components.configuration.optimization import OptimizationConfig, PartConfig
from components.configuration.trainings import AutoencoderLosses
from components.models.devices import ToldLater, to_device
from components.training.muon import Muon, hidden_matrices
from components.training.parallel import local

PATIENCE = 5  # consecutive steps
WATCHED, LEAST_WATCHED = 50, 10  # logged losses of a median
Decays = Mapping[str, Callable[[Tensor], Tensor]]


def make_optimizer(network: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) or Muon; only matrices and kernels decay.
    Parameters of a part with a rate of its own have a group, whose `factor` is in units of the training's rate."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    factors = {name: factor_of(name, config.parts) for name, _ in trained}
    by_muon = {id(parameter) for parameter in muon_parameters(network, config)}
    groups: list[dict[str, Any]] = []
    for factor in sorted({*factors.values()}):
        own = [parameter for name, parameter in trained if factors[name] == factor]
        rest = [parameter for parameter in own if id(parameter) not in by_muon]
        named = {} if factor == 1 else {"factor": factor}
        decayed = named | {"weight_decay": config.weight_decay}
        groups += [
            {"params": [p for p in own if id(p) in by_muon], "orthogonal": True} | decayed,
            {"params": [p for p in rest if p.ndim >= 2]} | decayed,
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0} | named,
        ]
    groups = [group for group in groups if group["params"]]
    kind = Muon if by_muon else torch.optim.AdamW
    return kind(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def muon_parameters(network: nn.Module, config: OptimizationConfig) -> list[nn.Parameter]:
    """Parameters for Muon, whose state is one number for each parameter, where AdamW has two."""
    return hidden_matrices(network) if config.optimizer == "muon" else []


def factor_of(name: str, parts: Mapping[str, PartConfig]) -> float:
    """Rate of a parameter in units of the training's, by the longest fitting pattern; 1 without one."""
    fitting = [pattern for pattern in parts if is_named(name, pattern)]
    return parts[max(fitting, key=lambda pattern: (len(pattern), pattern))].learning_rate if fitting else 1.0


def is_named(name: str, pattern: str) -> bool:
    """True for a parameter that fits a pattern of parameters, or of modules around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def freeze_parts(network: nn.Module, parts: Mapping[str, PartConfig]) -> None:
    """Leave parameters of parts at rate 0 without gradients; buffers, as moving codes, are no parameters.
    Raises ValueError for a part without a parameter, and if nothing is left to train."""
    named = dict(network.named_parameters())
    for pattern in parts:
        refuse(not any(is_named(name, pattern) for name in named), f"parts: no parameter is named as {pattern!r}")
    for name, parameter in named.items():
        if factor_of(name, parts) == 0:
            parameter.requires_grad_(False)
    refuse(not any(p.requires_grad for p in named.values()), "parts: nothing is left to train")


def learning_rate(config: OptimizationConfig, step: int) -> float:
    """The rate of `step` (1-based): linear warm-up, then linear or cosine decay to final_lr_fraction."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)  # (0, 1]
    left = 1 - progress if config.lr_decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


def kl_weight_at(losses: AutoencoderLosses, step: int) -> float:
    """Weight of the KL divergence in `step`, from 0 to kl_weight (Ramesh et al., 2021, appendix A.2)."""
    return along_cosine(0.0, losses.kl_weight, step=step, num_steps=losses.kl_warmup_steps)


def temperature_at(losses: AutoencoderLosses, step: int) -> float:
    """Temperature of the relaxation in `step`, from 1 to final_temperature; see `kl_weight_at`."""
    return along_cosine(1.0, losses.final_temperature, step=step, num_steps=losses.temperature_steps)


def along_cosine(start: float, end: float, *, step: int, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `num_steps`, constant from then on."""
    if step >= num_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2


class EMA:
    """Averages of a network's weights, from its own on, in evaluation mode; the first is for samples.
    `decays`: name in checkpoints -> the decay of update number n, () float64, 1-based. Buffers are copied."""

    def __init__(self, network: Any, decays: Decays, *, copied: Callable[[Any], Any] = deepcopy) -> None:
        self.decays = decays
        self.averages = {name: copied(network).float().eval().requires_grad_(False) for name in decays}
        self.network = next(iter(self.averages.values()))
        # On the device, where alone it is known which steps were taken.
        self.updates = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)

    def update(self, network: nn.Module, taken: Tensor | None = None) -> None:
        """Move the averages towards `network` where `taken`, () bool on its device, is true."""
        taken = torch.ones_like(self.updates, dtype=torch.bool) if taken is None else taken
        self.updates += taken
        for name, average in self.averages.items():
            move_average(average, network, weight=1 - self.decays[name](self.updates), taken=taken)


def decay_at(update: Tensor, *, decay: float) -> Tensor:
    """The decay of update number `update` of an exponential average, () float64, 1-based.
    At most (1 + n) / (10 + n), or a short run's average is mostly its start (improved-diffusion issue 59)."""
    return ((1 + update) / (10 + update)).clamp(max=decay)


@torch.no_grad()
def move_average(average: nn.Module, network: nn.Module, *, weight: Tensor, taken: Tensor) -> None:
    """Move parameters of `average` by a share `weight`, () float64, towards `network`; copy buffers.
    Nothing moves where `taken`, () bool, is false. Each rank moves its own shards."""
    masters = [local(parameter).float() for parameter in network.parameters()]
    averages = [local(parameter) for parameter in average.parameters()]
    if weight.device.type != "cpu":
        move_masked(averages, masters, weight=weight, taken=taken)
    elif taken:  # the host has it at hand
        torch._foreach_lerp_(averages, masters, weight.item())
    for old, new in zip(average.buffers(), network.buffers(), strict=True):
        old.copy_(torch.where(taken, new, old))


def move_masked(averages: list[Tensor], masters: list[Tensor], *, weight: Tensor, taken: Tensor) -> None:
    """Linear interpolation by a weight () on the device, in one pass; no bit moves where `taken` is false.
    A step of gradient descent of rate `weight` along (average - master): the "gradient" of torch's fused kernel is
    -master, and its decay of weights adds the average."""
    descent = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": True}
    place = {"lr": weight.float(), "found_inf": (~taken).float(), "grad_scale": None, "is_first_step": False}
    torch._fused_sgd_(averages, masters, [], **descent, **place)


class NonFiniteError(RuntimeError):
    """Training or weights left the finite numbers; the message has a remedy."""


class NonFiniteGuard:
    """Counts consecutive non-finite steps. All ranks see the same averaged norm, so all decide the same.
    The device masks the updates of refused steps. On a CPU the host reads the count at every step; elsewhere every
    `every` steps that of `every` steps before, which has long arrived."""

    def __init__(self, device: torch.device | str = "cpu", *, every: int = 1) -> None:
        self.every = every
        self.restore(0, device)

    def restore(self, consecutive: int, device: torch.device | str) -> None:
        """Restore a count of consecutive bad steps."""
        self.runs = to_device(torch.tensor([consecutive, consecutive]), device)  # the present one, the longest one
        self.earlier: ToldLater | None = None  # `runs` of `every` steps before
        self.step = 0

    def admits(self, norm: Tensor, *, step: int) -> Tensor:
        """True, () bool on the device, where the update of `step` may be taken. Raises as `refuse`."""
        taken, self.step = norm.isfinite(), step
        present = torch.where(taken, 0, self.runs[0] + 1)
        self.runs = torch.stack([present, torch.maximum(present, self.runs[1])])
        if self.runs.device.type == "cpu":
            self.check()
        elif step % self.every == 0:
            if self.earlier is not None:
                self.refuse(self.earlier.read())
            self.earlier = ToldLater(self.runs)
        return taken

    def check(self) -> int:
        """Consecutive bad steps at present. Waits for the device. Raises NonFiniteError after PATIENCE."""
        runs = self.runs.cpu()
        self.refuse(runs)
        return int(runs[0])

    def refuse(self, runs: Tensor) -> None:
        """Raise NonFiniteError if the longest of `runs`, (2,), reached PATIENCE."""
        if runs[1] >= PATIENCE:
            raise NonFiniteError(
                f"loss or gradient was not finite for {PATIENCE} steps in a row, up to step {self.step}; try a lower "
                "learning_rate, a longer warmup_steps, a smaller max_grad_norm or precision: fp32 "
                "(the last good checkpoint is kept)"
            )


class DivergedError(RuntimeError):
    """Losses are finite and far above those of before; the message has a remedy."""


class LossWatch:
    """Compares logged losses, the same on all ranks, with their running median.
    Of an autoencoder the reconstruction's loss, for the sum goes through zero where a discriminator has part in it."""

    def __init__(self, config: OptimizationConfig) -> None:
        self.factor, self.most = config.max_loss_factor, config.max_loss_logs
        self.losses: deque[float] = deque(maxlen=WATCHED)
        self.high = 0  # logs in a row with a loss far above the median

    def add(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Compare the loss of a step. Raises DivergedError after `max_loss_logs` high ones in a row."""
        name = "reconstruction_loss" if "reconstruction_loss" in metrics else "loss"
        loss = metrics[name]
        if self.factor is None or not math.isfinite(loss):
            return
        if len(self.losses) >= LEAST_WATCHED:
            middle, size = median(self.losses), median(map(abs, self.losses))
            if loss > middle + (self.factor - 1) * size:  # of losses above zero: loss > factor * median
                self.high += 1
                if self.high < self.most:
                    return
                raise DivergedError(
                    f"{name} {loss:.4g} at step {step} is far above its median {middle:.4g}, {self.high} logs in "
                    "a row: training has diverged; try a lower learning_rate, a longer warmup_steps or a smaller "
                    f"max_grad_norm (the last good checkpoint is kept), or raise max_loss_factor from {self.factor:g}"
                )
        self.high = 0
        self.losses.append(loss)


WIDTHS = (0.05, 0.10)  # sigma_rel of the tracked averages, as published
CUTOFF = 1e-13  # relative size of singular values that are nothing but rounding


class EMAProfile(NamedTuple):
    """Moment and width of an average."""

    updates: int  # of the optimizer, up to the moment
    sigma_rel: float  # standard deviation of the profile over `updates`, in (0, 0.28)


def power_decays(sigma_rel: float) -> Decays:
    """Decays of both averages under their names in checkpoints; the first is nearest to `sigma_rel`."""
    named = zip(("ema", "second_ema"), nearest_first(sigma_rel), strict=True)
    return {name: partial(power_decay_at, gamma=gamma_of(width)) for name, width in named}


def nearest_first(sigma_rel: float) -> list[float]:
    """The tracked widths, by distance from `sigma_rel`."""
    return sorted(WIDTHS, key=lambda width: abs(width - sigma_rel))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile by width (equation 126). Raises ValueError outside (0, 0.28)."""
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"the width of an average, sigma_rel, must be in (0, 0.28), not {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay_at(update: Tensor, *, gamma: float) -> Tensor:
    """The decay of update number `update`, () float64, 1-based (equation 127); 0 for the first."""
    return (1 - 1 / update) ** (gamma + 1)


def correlations(rows: Sequence[EMAProfile], columns: Sequence[EMAProfile]) -> np.ndarray:
    """Inner products of profiles as functions of time (equation 151), (len(rows), len(columns)) float64."""
    t_a, t_b = np.array([[p.updates for p in rows]], float).T, np.array([[p.updates for p in columns]], float)
    gamma_a = np.array([[gamma_of(p.sigma_rel) for p in rows]]).T
    gamma_b = np.array([[gamma_of(p.sigma_rel) for p in columns]])
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)  # earlier over later
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def posthoc_factors(profiles: Sequence[EMAProfile], sigma_rel: float) -> np.ndarray:
    """Factors of snapshots, (N,) float64 with sum 1, for the average of width `sigma_rel` at the end.
    By least squares (algorithm 3). Raises ValueError for a width without a profile, or where there is no snapshot."""
    if not profiles:
        raise ValueError("there is no snapshot")
    target = EMAProfile(max(profile.updates for profile in profiles), sigma_rel)
    products = correlations(profiles, [target])[:, 0]
    solution, *_ = np.linalg.lstsq(correlations(profiles, profiles), products, rcond=CUTOFF)
    return solution / solution.sum()


def combine(snapshots: Iterable[Mapping[str, Tensor]], weights: np.ndarray) -> dict[str, Tensor]:
    """Linear combination of snapshots, added in float64, as fp32; other tensors are the last one's."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        for name, tensor in snapshot.items():
            added = weight * tensor.double() if tensor.is_floating_point() else tensor
            total[name] = total[name] + added if name in total and tensor.is_floating_point() else added
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}
