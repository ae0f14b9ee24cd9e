"""Muon (Jordan et al., 2024): momentum with singular values of about 1, for matrices and kernels.

After "Muon: An optimizer for hidden layers in neural networks". AdamW is left with embeddings, biases, norms, and
layers to or from few channels.

A matrix's gradient has a few large singular values, and plain momentum would move it along those alone. A polynomial of
odd powers, applied five times (a Newton-Schulz iteration), takes all of them near to 1 without a decomposition: rare
directions are learned as fast as frequent ones. A kernel (O, I, H, W) is the matrix (O, I H W). Updates are scaled to
entries of the size of AdamW's, so both take one learning rate (Liu et al., 2025, "Muon is Scalable for LLM Training",
equation 4).

torch.optim.Muon takes matrices alone, computes in bf16 on every device, and has no `found_inf`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from components.training.parallel import is_cut, local

MOMENTUM = 0.95
RMS = 0.2  # of the entries of an update, about as AdamW's
A, B, C = 3.4445, -4.7750, 2.0315  # of s -> A s + B s^3 + C s^5, steep at 0, which ends between about 0.7 and 1.2
ITERATIONS = 5
FEWEST = 8  # rows or columns of a matrix; fewer are the channels of an image


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Trained weights of linear maps and convolutions for Muon, without weights shared by an embedding."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    maps = [module for module in network.modules() if isinstance(module, (nn.Linear, _ConvNd))]
    weights = [each.weight for each in maps if isinstance(each.weight, nn.Parameter) and each.weight.requires_grad]
    fitting = [weight for weight in weights if id(weight) not in tables and min(matrix(weight).shape) >= FEWEST]
    return [*{id(weight): weight for weight in fitting}.values()]


def matrix(weight: Tensor) -> Tensor:
    """A kernel (O, I, H, W) as the matrix (O, I H W)."""
    return weight.flatten(1)


def orthogonal(update: Tensor) -> Tensor:
    """A matrix or kernel with the singular vectors of `update` and singular values of about 1.
    Products are in bf16 on a GPU, as published, and in fp32 on a CPU, which may have none."""
    rows = matrix(update).to(torch.bfloat16 if update.is_cuda else torch.float32)
    wide = rows if rows.shape[0] <= rows.shape[1] else rows.T
    wide = wide / (wide.norm() + 1e-7)  # singular values of at most 1
    for _ in range(ITERATIONS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=B, alpha=C), wide, beta=A)
    rows = wide if rows.shape[0] <= rows.shape[1] else wide.T
    return rows.reshape(update.shape).to(update.dtype)


def orthogonal_shard(update: Tensor) -> Tensor:
    """`orthogonal` of a matrix, whole or in shards; shards are gathered for the moment."""
    if not is_cut(update):
        return orthogonal(update)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(update, DTensor)
    whole = orthogonal(update.full_tensor()).contiguous()
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `orthogonal`, AdamW for the rest; `found_inf` refuses a whole step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step along the gradients at hand, of all ranks together where parameters are in shards."""
        refused = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"] if group.get("orthogonal") else ():
                if parameter.grad is not None:
                    self.step_along(parameter, group, refused)
                    parameter.grad = None  # AdamW leaves parameters without a gradient alone
        return super().step(closure)

    def step_along(self, parameter: nn.Parameter, group: dict[str, Any], refused: Tensor | None) -> None:
        """Move a matrix or kernel, by Nesterov's momentum; not where `refused`, (), is 1."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:  # AdamW expects a count of steps in each state
            count = torch.zeros((), device=local(parameter).device)
            state.update({"step": count, "exp_avg": torch.zeros_like(parameter)})
        average = state["exp_avg"].lerp(gradient, 1 - MOMENTUM)
        update = orthogonal_shard(gradient.lerp(average, MOMENTUM))
        rate, decay = group["lr"], group["weight_decay"]
        moved = parameter * (1 - rate * decay) - rate * RMS * math.sqrt(max(matrix(parameter).shape)) * update
        for old, new in ((state["exp_avg"], average), (parameter, moved), (state["step"], state["step"] + 1)):
            old, new = local(old), local(new)
            old.copy_(new if refused is None else torch.where(refused.bool(), old, new))
