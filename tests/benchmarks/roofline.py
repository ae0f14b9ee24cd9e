"""A bound of a step's utilization of a GPU, by rules: bytes and operations of each operation, on the meta device.

The task itself takes its step (`StepModel`), in its recipe's precision, eager. The rules, which no later change of the
product moves:

1. An operation takes max(operations / (PRODUCTS * peak), bytes / (BANDWIDTH * bandwidth)); operations follow each
   other. A multiplication and an addition are two operations, and only matrix products, convolutions and attention have
   any. Peak and bandwidth are an H100's by its data sheet, of the type that is multiplied.
2. It reads each tensor that it is given once, and writes each result once; numbers that are repeated count once. Views
   and memory that nobody fills are free. What is overwritten is not read. A table is read where it is looked up.
3. Norms take what torch's kernels take: group and batch norms read their input once for moments and once to scale it,
   and backward the input and the gradient twice; a layer norm reads its input once, and backward twice where it has
   weights.
4. A convolution multiplies in NHWC: each of its tensors in another order is read and written once more. Its result has
   that order where the input or the kernel has it, as on GPUs (torch, ATen/native/ConvUtils.h); meta tensors lose it.
5. Fused is what is one kernel in the code: attention, AdamW, an average. What a compiler would fuse is not counted as
   fused: no compiled graph of a GPU has been looked at.
6. Clipping, AdamW and averages move the bytes of `update_work`. The network between GPUs, launches and waits for data
   take no time; launches are counted beside.

`make roofline` prints the table of docs/SPEED.md."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from components.training.activations import GPUKernels
from components.training.step_model import StepModel, take_gradients
from pipelines.planning.memory import model_of
from pipelines.planning.step_time import FREE, update_work
from pipelines.recipes.catalog import load_recipe
from pipelines.workflows import build_workflow

PEAKS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}  # dense; training in bf16 has no TF32
MEMORY = 3.35e12  # bytes/s
PRODUCTS, BANDWIDTH = 0.75, 0.9  # shares of the peaks that large kernels of vendors' libraries reach
NORMS = {  # reads of the large inputs, forward and backward
    "native_group_norm": 2,
    "native_group_norm_backward": 2,
    "native_batch_norm": 2,
    "native_batch_norm_backward": 2,
    "native_layer_norm": 1,
    "native_layer_norm_backward": 2,
}
COPIES = {"clone", "copy_", "_to_copy"}
OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "exponential_", "bernoulli_"}
LOOKUPS = {"embedding", "index", "gather", "index_select"}
KINDS = ("products", "norms", "layout", "casts", "others", "update")
LATENT_DIT = (
    "base.network={kind: dit, patch_size: 2, model_dim: 1152, num_layers: 28, num_heads: 16}",
    "base.process={kind: discrete, schedule: linear, prediction_type: epsilon, variance: learned_range, loss: hybrid, "
    "min_snr_gamma: null}",
    "base.cond_drop_prob=0.1",
)
CASES = {  # recipe, stage, samples of a GPU, changes
    "ADM, 256²": ("adm_imagenet_256", "base", 32, ()),
    "DiT-XL/2, 256²": ("ldm_imagenet_f8", "base", 32, LATENT_DIT),
    "class prior": ("imagenet_class_prior", "prior", 8, ()),
    "VQ-GAN, f16": ("vqgan_imagenet_f16_1024", "tokenizer", 3, ()),
}


class Cost(NamedTuple):
    """What an operation needs; seconds by rule 1."""

    kind: str  # of KINDS
    flops: float
    bytes: float
    peak: float = PEAKS[torch.float32]

    @property
    def seconds(self) -> float:
        return max(self.flops / (PRODUCTS * self.peak), self.bytes / (BANDWIDTH * MEMORY))


class Roofline(TorchDispatchMode):
    """Costs of all operations on the meta device inside."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet is torch.ops.aten.convolution and not all(map(is_nchw, args[:2])):
            output = output.contiguous(memory_format=torch.channels_last)
        if not func.is_view and packet.__name__ not in FREE:
            given, made = on_device(args, kwargs), on_device(output)
            if given or made:
                self.costs.extend(costs_of(packet, given, made, args, kwargs or {}, output))
        return output


def on_device(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


def costs_of(
    packet: Any, given: list[Tensor], made: list[Tensor], args: Any, kwargs: Any, output: Any
) -> Iterator[Cost]:
    """Yields the costs of an operation by rules 2 to 4; `given` and `made` are its tensors."""
    name, written = packet.__name__, sum(map(size, made))
    read = sum(map(size, given[1:] if name in OVERWRITING else given))
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=output)
        yield Cost("products", flops, read + written, PEAKS.get(given[0].dtype, PEAKS[torch.float32]))
        if name.startswith("convolution"):
            yield Cost("layout", 0, sum(2 * size(each) for each in (*given, *made) if is_nchw(each)))
    elif name in NORMS:
        yield Cost("norms", 0, written + norm_reads(name, given))
    elif name in COPIES and given and made:
        yield Cost(kind_of_copy(given[-1], made[0]), 0, read + written)
    else:
        yield Cost("others", 0, written + (written if name in LOOKUPS else read))


def norm_reads(name: str, given: list[Tensor]) -> int:
    """Bytes that a norm reads by rule 3; the large ones have as many numbers as the first."""
    large = [size(each) for each in given if each.numel() == given[0].numel()]
    weighted = name != "native_layer_norm_backward" or any(each.ndim == 1 for each in given)
    return sum(map(size, given)) + (NORMS[name] - 1) * sum(large) * weighted


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers; of repeated ones once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def is_nchw(tensor: Tensor) -> bool:
    """True for four dimensions in another order than NHWC."""
    return tensor.ndim == 4 and not tensor.is_contiguous(memory_format=torch.channels_last)


def kind_of_copy(source: Tensor, made: Tensor) -> str:
    """A change of type, or else of the order in memory."""
    return "casts" if source.dtype != made.dtype and source.stride() == made.stride() else "layout"


class Bound(NamedTuple):
    """A step of one GPU."""

    seconds: dict[str, float]  # by KINDS
    bytes: dict[str, float]  # by KINDS
    flops: float
    launches: int

    @property
    def utilization(self) -> float:
        """Share of the peak in bf16, as large as the rules let it be."""
        return self.flops / PEAKS[torch.bfloat16] / sum(self.seconds.values())


def bound(model: StepModel, samples: int) -> Bound:
    """The bound of a step of so many samples on a GPU."""
    step = model.training.optimization.total_steps
    with (roofline := Roofline()), GPUKernels():
        take_gradients(model.loaded_task(), model.batch(samples), step=step)
    costs = roofline.costs
    for learner in model.learners:
        launched, moved = update_work(learner)
        costs += [Cost("update", 0, moved / launched)] * launched
    return Bound(by_kind(costs, "seconds"), by_kind(costs, "bytes"), sum(cost.flops for cost in costs), len(costs))


def by_kind(costs: list[Cost], what: str) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for cost in costs:
        sums[cost.kind] += getattr(cost, what)
    return {kind: sums[kind] for kind in KINDS}


def bound_of(case: str, *changes: str) -> Bound:
    """The bound of a case of CASES, with further assignments `stage.field=value`."""
    recipe, stage, samples, own = CASES[case]
    return bound(model_of(build_workflow(load_recipe(recipe, [*own, *changes])).by_name[stage]), samples)


def row(case: str, found: Bound) -> str:
    """A line of the table: milliseconds and GB by kind."""
    cells = [f"{1e3 * found.seconds[kind]:,.1f} ({found.bytes[kind] / 1e9:,.1f})" for kind in KINDS]
    total = 1e3 * sum(found.seconds.values())
    share = f"{100 * found.utilization:.0f} %"
    return f"| {' | '.join([case, str(CASES[case][2]), *cells, f'{total:,.1f}', f'{found.launches:,}', share])} |"


def main() -> None:
    print(f"| training | samples | {' | '.join(KINDS)} | ms | launches | bound |")
    print("|---" * (len(KINDS) + 5) + "|")
    for case in CASES:
        print(row(case, bound_of(case)), flush=True)


if __name__ == "__main__":
    main()
