"""Seconds of a training's step on a GPU, from counts: launches, memory, products, network.

The host launches every operation, while the GPU moves bytes and computes products one after the other: the slower of
both sides lasts, and then what of the network no backward pass hides. Operations and bytes are counted where the task
itself takes its step on torch's meta device, with a GPU's kernels, in the recipe's precision, with so many samples and
with twice as many. All is counted as eager: blocks that are compiled launch and move less. An operation counts as one
kernel, and some are several. Not modeled are reads that are late, evaluation, checkpoints and the start.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from components.models.layers import blocks_of, rounded_maps
from components.runtime.execution import Resources
from components.training.activations import GPUKernels, Linear
from components.training.learner import Learner
from components.training.optim import muon_parameters
from components.training.step_model import KnownLayouts, StepModel, take_gradients
from pipelines.planning.memory import device_bytes, network_bytes, part_bytes, step_memory
from pipelines.planning.profiles import Cluster

LAUNCH = 5e-6  # seconds of the host for an operation: a launch takes 4 to 6 µs
TCP = 12.5e9  # bytes/s of a node each way: 100 Gbit/s
COLLECTIVE = 30e-6  # seconds of a collective without bytes, assumed
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once, its default
BACKWARD = 2 / 3  # of a pass
RECOMPUTED = 4 / 3  # passes where activations are computed again: one more forward
# Kernels over many tensors take 36 tensors of four lists at a time, and 320 chunks of 65,536 numbers (torch,
# ATen/native/cuda/MultiTensorApply.cuh).
TENSORS, NUMBERS = 36, 320 * 65_536
# Numbers read and written for each weight: a norm and a scaling; AdamW reads four and writes three; an average reads
# two and writes one.
CLIPPED, STEPPED, AVERAGED = 3, 7, 3
MUON = 30  # launches for a matrix
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Work(NamedTuple):
    """Operations that a pass launches, and bytes moved by those without products, by samples."""

    launches: Linear
    moved: Linear


class StepTime(NamedTuple):
    """Seconds of a step by its terms, each >= 0."""

    launches: float  # of the host
    memory: float  # of the GPU, for what is no product
    products: float  # of the GPU
    network: float  # after the others

    @property
    def seconds(self) -> float:
        return max(self.launches, self.memory + self.products) + self.network


class Launches(TorchDispatchMode):
    """Counts operations on a device by name, without views, and bytes moved by those without products."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.operations, self.moved = device, Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, packet = func(*args, **(kwargs or {})), func._overloadpacket
        leaves = [] if func.is_view or packet.__name__ in FREE else tree_leaves((args, kwargs, output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == self.device]
        self.operations[packet.__name__] += bool(tensors)
        if packet not in flop_registry:  # of repeated numbers, each is read once
            self.moved += sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors)
        return output


def counted(take: Callable[[int], object], *, unit: int = 1) -> Work:
    """Count the work of `take(samples)` for any number of samples, by `unit` of them and by twice as many."""
    pairs = []
    for samples in (unit, 2 * unit):
        with KnownLayouts(), (launches := Launches()), GPUKernels():
            take(samples)
        pairs.append((launches.operations.total(), launches.moved))
    return Work(*(Linear.through(once, twice, unit=unit) for once, twice in zip(*pairs, strict=True)))


@cache
def pass_work(model: StepModel) -> Work:
    """Count a pass forward and backward of a training's last step, when every loss has begun.
    Raises PerceptualWeightsError where the package of its perceptual network is missing."""
    optimization, task = model.training.optimization, model.loaded_task()

    def take(samples: int) -> None:
        take_gradients(task, model.batch(samples), step=optimization.total_steps)
        for learner in model.learners:
            learner.network.zero_grad(set_to_none=True)

    return counted(take, unit=optimization.equal_parts)


@cache
def encoding_work(model: StepModel, column: str) -> Work:
    """Count the work of a frozen network for a column, named as for `StepModel.encoding_flops`."""
    return counted(lambda samples: model.encode(column, samples))


def update_work(learner: Learner, *, shards: int = 1) -> tuple[int, int]:
    """Launches and bytes of clipping, optimizer and averages of a learner, cut into `shards` parts.
    Left out are Muon's products, at most 5 m / T of a pass's for a matrix of m rows and T tokens or pixels a step."""
    trained = [parameter for parameter in learner.network.parameters() if parameter.requires_grad]
    numbers = sum(part_bytes(parameter, shards) for parameter in trained) // trained[0].element_size()
    averages = len(learner.ema.averages) if learner.ema else 0
    kernels = math.ceil(len(trained) / TENSORS) + numbers // NUMBERS
    muon = MUON * len(muon_parameters(learner.network, learner.config))
    return kernels * (2 + 1 + averages) + muon, 4 * numbers * (CLIPPED + STEPPED + AVERAGED * averages)


def step_time(
    model: StepModel,
    resources: Resources,
    cluster: Cluster,
    *,
    flops: float,
    frozen: Sequence[Work] = (),
    frozen_flops: float = 0,
) -> StepTime:
    """Seconds of a step on each of a training's workers, on a cluster whose GPU is known.
    Where no sample fits its memory, samples count as taken one by one. `frozen`: work of the networks that make
    columns, which no backward pass computes again. `flops`: of the training's own networks, all samples of a step."""
    gpu, optimization, workers = cluster.known_gpu, model.training.optimization, resources.num_workers
    share = optimization.global_batch_size / workers
    parts = math.ceil(share / max(1, step_memory(model, resources).fitting(gpu.memory)))
    shards = resources.shards(workers)
    passes = zip(pass_work(model), *frozen, strict=True)
    updates = zip(*(update_work(learner, shards=shards) for learner in model.learners), strict=True)
    again = RECOMPUTED if optimization.gradient_checkpointing else 1.0
    times = (again, *[1.0] * len(frozen))
    launches, moved = (
        sum(n * (parts * each.fixed + share * each.sample) for n, each in zip(times, lines, strict=True)) + sum(update)
        for lines, update in zip(passes, updates, strict=True)
    )
    products = (again * flops + frozen_flops) / workers / (gpu.peak * gpu.products)
    terms = (LAUNCH * launches, moved / gpu.bandwidth, products)
    busy = StepTime(*terms, 0.0).seconds
    network = exposed(model, resources, cluster, parts=parts, busy=busy)
    return StepTime(*(term * (gpu.measured or 1.0) for term in (*terms, network)))


def exposed(model: StepModel, resources: Resources, cluster: Cluster, *, parts: int, busy: float) -> float:
    """Seconds of the network that nothing hides, of `busy` seconds for `parts` parts of a batch.
    Whole networks sum their gradients in a ring while the last part goes backward (Patarasuk and Yuan, 2009: each of W
    workers sends 2 (W - 1) / W of them); shards gather weights twice and scatter gradients once in each part, all the
    while, and copies of them sum their gradients as whole networks do, in a ring for each shard; rings of a node share
    its network. The last collective is always waited for."""
    workers, held = resources.num_workers, device_bytes(model)
    if workers == 1:
        return 0.0
    shards, gpus, outside = resources.shards(workers), resources.gpus_per_worker, cluster.known_gpu.fabric
    outside = TCP if cluster.network == "tcp" else outside

    def seconds(sent: float, among: int, spread: int) -> float:
        bandwidth = cluster.known_gpu.link if spread * gpus <= cluster.node_gpus else outside
        return sent * (among - 1) / among / bandwidth

    copies = workers // shards
    rings = 1 if workers * gpus <= cluster.node_gpus else min(shards, cluster.node_gpus // gpus)
    needed = seconds(rings * 2 * held.gradients / shards, copies, workers)
    collectives, hidden = math.ceil(held.gradients / shards / BUCKET), BACKWARD * busy / parts
    if shards > 1:
        blocks = blocks_of(model.network).values()
        rounded = sum(network_bytes(part) for block in blocks for part in rounded_maps(block)) // 2
        weights = held.weights - (rounded if model.training.optimization.precision == "bf16" else 0)
        needed += seconds(parts * (2 * weights + held.gradients), shards, shards)
        collectives, hidden = 3 * parts * (1 + len(blocks)), busy
    needed += COLLECTIVE * collectives
    return max(needed - hidden, needed / collectives)
