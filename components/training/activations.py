"""Bytes that a training's step keeps between its forward and backward pass, from its configuration.

The task itself takes its step on torch's meta device, in the recipe's precision and with the kernels of a GPU, with so
many samples and with twice as many: the difference is what each sample keeps, the rest does not grow. Counted is each
storage once, as `torch.autograd.graph.saved_tensors_hooks` sees them. Not counted is what lives for a moment (gradients
between layers, workspaces of kernels), fragments, and what frozen networks need. Compiled blocks keep less."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from components.models.layers import blocks_of
from components.training.loop import Batch
from components.training.step_model import KnownLayouts, StepModel, WithoutNumbers, acting, learners_of, take_gradients

Storages = dict[int, Tensor]  # one tensor of each storage, which keeps it, by the storage's identity


class Linear(NamedTuple):
    """Bytes of any number of samples at a time."""

    fixed: int
    sample: int

    @classmethod
    def through(cls, once: int, twice: int, *, unit: int) -> "Linear":
        """The line through what `unit` samples keep, and twice as many."""
        sample = (twice - once) // unit
        return cls(once - unit * sample, sample)

    def of(self, samples: int) -> int:
        return self.fixed + samples * self.sample


class Activations(NamedTuple):
    """Bytes that a step keeps; see `Kept`."""

    whole: Linear
    recomputed: Linear
    block: Linear

    def needed(self, *, recompute: bool, sharded: bool) -> Linear:
        """The most bytes at any time of a step. Where blocks are computed again, one block is whole meanwhile.
        Copies in bf16 of all weights last until the forward pass ends, but for those of weights in shards."""
        if not recompute:
            return self.whole
        fixed = self.recomputed.fixed + self.block.fixed
        return Linear(fixed if sharded else max(fixed, self.whole.fixed), self.recomputed.sample + self.block.sample)


def activations(model: StepModel) -> Activations:
    """Count the activations of the last step of a training, when every loss has begun.
    Raises PerceptualWeightsError where the package of its perceptual network is missing."""
    training = model.training
    unit = training.optimization.equal_parts
    with KnownLayouts(), GPUKernels():
        once, twice = (
            step_keeps(model.loaded_task(), model.batch(samples), step=training.optimization.total_steps)
            for samples in (unit, 2 * unit)
        )
    pairs = list(zip(once, twice, strict=True))  # of several passes the largest
    blocks = [block for one, two in pairs for block in zip(one.blocks, two.blocks, strict=True)]
    return Activations(
        whole=largest(Linear.through(one.whole, two.whole, unit=unit) for one, two in pairs),
        recomputed=largest(Linear.through(one.recomputed, two.recomputed, unit=unit) for one, two in pairs),
        block=largest(Linear.through(*block, unit=unit) for block in blocks),
    )


def largest(lines: Iterable[Linear]) -> Linear:
    """The line that is never below any of these; zero for a network without blocks."""
    fixed, sample = zip(*([*lines] or [Linear(0, 0)]), strict=True)
    return Linear(max(fixed), max(sample))


class Kept(NamedTuple):
    """Bytes that a pass keeps, without weights and buffers."""

    whole: int
    recomputed: int  # where blocks keep only what goes into them
    blocks: tuple[int, ...]  # of each block more, while it is computed again


def step_keeps(task: Any, batch: Batch, *, step: int) -> list[Kept]:
    """Bytes kept by each pass of a step with this batch, on any device; nothing goes backward."""
    keeping = Keeping([learner.network for learner in learners_of(task)])
    with keeping.during(), ExitStack() as stack:
        for name in getattr(task, "gone_before_backward", ()):
            stack.enter_context(acting(task, **{name: partial(uncounted, getattr(task, name))}))
        take_gradients(task, batch, step=step, backward=keeping.backward)
    return keeping.passes


def uncounted(function: Callable[[Any], Any], *arguments: Any) -> Any:
    """Call the function; nothing that it saves counts as kept."""
    with torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is):
        return function(*arguments)


class Keeping:
    """Counts what is kept during passes of these networks, each until it goes backward."""

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        self.blocks = [block for network in networks for block in blocks_of(network).values()]
        self.held = {identity(tensor) for network in networks for tensor in (*network.parameters(), *network.buffers())}
        self.passes: list[Kept] = []
        self.begin()

    def begin(self) -> None:
        """Begin a pass."""
        self.outside, self.arguments, self.inside = Storages(), Storages(), list[Storages]()
        self.open = self.outside

    @contextmanager
    def during(self) -> Iterator[None]:
        """Inside, what is kept is counted."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self.leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, as_it_is))
            yield

    def keep(self, tensor: Tensor) -> Tensor:
        if identity(tensor) not in self.held:
            self.open[identity(tensor)] = tensor
        return tensor

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = {identity(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.arguments |= {key: tensor for key, tensor in arguments.items() if key not in self.held}
        self.open = Storages()
        self.inside.append(self.open)

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.open = self.outside

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """End a pass in place of `Learner.backward`; one whose graph is retained goes on."""
        if not retain_graph:
            self.passes.append(self.kept())
            self.begin()

    def kept(self) -> Kept:
        """Bytes that the pass has kept until now."""
        recomputed, whole = self.outside | self.arguments, dict(self.outside)
        for storages in self.inside:
            whole |= storages
        blocks = [bytes_of({key: storages[key] for key in storages.keys() - recomputed}) for storages in self.inside]
        return Kept(bytes_of(whole), bytes_of(recomputed), tuple(blocks))


def identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(storages: Storages) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class GPUKernels(WithoutNumbers):
    """Kernels of a GPU for meta tensors: attention keeps no matrix of weights, dropout a byte an element."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            return fused_attention(*args, **options)
        if name == "dropout" and not options.get("inplace"):
            return fused_dropout(*args, **options)
        return super().__torch_function__(func, types, args, options)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention by torch's memory-efficient kernel, which keeps q, k, v, output and a number a query."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
