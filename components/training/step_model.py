"""Tasks by model family, and the real step of a training on the meta device, which counts operations.

The task itself takes its own step, in the recipe's losses and conditions, up to the last gradient, without any memory.
torch counts matrix products, convolutions and attention, whose products it counts under its plain kernel alone
(SDPBackend.MATH). A multiplication and an addition are two operations, where many papers count one. Not counted is what
costs no product (norms, optimizer, averages), and the price of little memory: parts of a batch, recomputed activations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from components.configuration.conditions import IMAGES, DatasetInfo, TokenGrid
from components.configuration.families import family_name
from components.configuration.optimization import PerceptualNetwork, Training
from components.models.autoencoder import Autoencoder
from components.models.critics import VGG16_CHANNELS, PerceptualLoss, VGG16Features
from components.training.frozen import LoadEncoder
from components.training.learner import Learner, without_memory
from components.training.loop import Batch, Task
from components.training.parallel import Worker
from components.training.tasks.autoencoder import AutoencoderTask
from components.training.tasks.diffusion import DiffusionPriorTask, diffusion_task
from components.training.tasks.gan import GANTask
from components.training.tasks.prior import MaskedPriorTask, PixelTask, PriorTask
from components.training.tasks.recognition import ClassifierTask, ContrastiveTask
from components.weights.perceptual import EfficientNetFeatures, check_perceptual_network

TASKS: dict[str, Callable[..., Task]] = {
    "autoencoder": AutoencoderTask,
    "prior": PriorTask,
    "masked_prior": MaskedPriorTask,
    "pixels": PixelTask,
    "gan": GANTask,
    "diffusion": diffusion_task,
    "diffusion_prior": DiffusionPriorTask,
    "classifier": ClassifierTask,
    "contrastive": ContrastiveTask,
}


def task_maker(
    training: Training,
    dataset_info: DatasetInfo = IMAGES,
    *,
    grid: TokenGrid | None = None,
    load_encoders: Sequence[LoadEncoder] = (),
    load_tokenizer: Callable[[], Autoencoder] | None = None,
) -> Callable[..., Task]:
    """A maker of the training's task, to be called with `worker`; picklable.

    Args:
        dataset_info: the data set's facts, such as the number of classes.
        grid: of a prior's tokens; None for a training on images.
        load_encoders: loaders of frozen networks that add columns to batches.
        load_tokenizer: loads the network from tokens to images, for previews; None: no previews."""
    make = partial(TASKS[family_name(training.network.kind)], training, dataset_info=dataset_info, grid=grid)
    return partial(make, load_encoders=load_encoders, load_tokenizer=load_tokenizer)


META = Worker(device=torch.device("meta"))
DRAWN = {Tensor.exponential_, Tensor.normal_, Tensor.uniform_}


class WithoutNumbers(TorchFunctionMode):
    """Inside, draws of meta tensors are zeros, an operation too, and nothing is pinned or copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory or (func in DRAWN and args[0].device.type == "meta"):
            return args[0].zero_() if func in DRAWN else args[0]
        return func(*args, **(kwargs or {}))


class KnownLayouts(TorchDispatchMode):
    """Inside, an operation on meta tensors of layouts that were seen before has outputs as then.
    torch derives them in Python, which takes most of the time of a large network's pass."""

    outputs: ClassVar[dict[Any, Any]] = {}  # by operation and arguments; None: to be asked each time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        key = (func, layouts(args), layouts(tuple(given[1].items())))
        if (known := self.outputs.get(key)) is not None:
            return empty(known)
        output = func(*args, **given[1])
        if key not in self.outputs:
            self.outputs[key] = empty(output) if is_new(output, given) and not func._schema.is_mutable else None
        return output


def layouts(value: Any) -> Any:
    """Arguments of an operation as a key, with layouts in place of tensors; 1 is not 1.0."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    return tuple([layouts(each) for each in value]) if isinstance(value, (list, tuple)) else (type(value), value)


def empty(value: Any) -> Any:
    """Meta tensors of the same layouts in place of tensors."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return tuple([empty(each) for each in value]) if isinstance(value, (list, tuple)) else value


def is_new(output: Any, given: Any) -> bool:
    """True where there are outputs, each a meta tensor that fills a storage of its own."""
    made, others = ([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (output, given))
    storages = {tensor.untyped_storage()._cdata for tensor in made}
    return (
        all(tensor.device.type == "meta" for tensor in (*made, *others))
        and len(storages - {tensor.untyped_storage()._cdata for tensor in others}) == len(made) > 0
        and all(tensor.nbytes == tensor.untyped_storage().nbytes() for tensor in made)
    )


class TrainingFlops(NamedTuple):
    """Operations of a training."""

    step: int  # of its last step, when every loss has begun
    total: int  # of all steps


class StepModel:
    """A training's task on the meta device, without compilation, recomputation and frozen encoders."""

    def __init__(
        self, training: Training, dataset_info: DatasetInfo = IMAGES, *, grid: TokenGrid | None = None
    ) -> None:
        """Build the networks, with shapes alone. Raises ValueError for a set without what it learns from."""
        self.training, self.dataset_info, self.grid = training, dataset_info, grid
        config: Any = training
        config = config.replace(
            optimization=config.optimization.replace(compile_network=False, gradient_checkpointing=False)
        )
        if config.needs().perceptual_network != "none":  # see `loaded_task`
            config = config.replace(losses=config.losses.replace(perceptual_network="none"))
        with WithoutNumbers():
            self.task: Any = task_maker(config, dataset_info, grid=grid)(worker=META)

    @property
    def learners(self) -> list[Learner]:
        """The learners of all networks that are trained."""
        return learners_of(self.task)

    @property
    def network(self) -> Any:
        """The network that is kept in the end."""
        return self.learners[-1].network

    def flops(self, step: int | None = None) -> int:
        """Operations of a step (1-based; None: the last), forward and backward, for the global batch.
        Raises PerceptualWeightsError where the package of its perceptual network is missing."""
        samples, step = self.training.optimization.global_batch_size, step or self.training.optimization.total_steps
        once = 1 if self.training.needs().degradations else samples  # degradations of many take minutes
        with WithoutNumbers(), counting() as counter:
            take_gradients(self.loaded_task(), self.batch(once), step=step)
        for learner in self.learners:
            learner.network.zero_grad(set_to_none=True)
        return samples // once * counter.get_total_flops()

    def training_flops(self) -> TrainingFlops:
        """Operations of the last step and of all, fewer until a discriminator is heard. Raises as `flops`."""
        steps, quiet = self.training.optimization.total_steps, self.training.quiet_steps
        last = self.flops()
        first = self.flops(step=quiet) if 0 < quiet < steps else last
        return TrainingFlops(last, quiet * first + (steps - quiet) * last)

    def encoding_flops(self, column: str) -> int:
        """Operations of the finished network for a column of one sample.
        `latents` or `tokens` of an autoencoder; `image_embedding`, or a text's, of a contrastive encoder."""
        with counting() as counter:
            self.encode(column, 1)
        return counter.get_total_flops()

    @torch.no_grad()
    def encode(self, column: str, samples: int) -> None:
        """Have the finished network make a column, named as for `encoding_flops`, of so many samples."""
        methods = {"tokens": "tokenize", "latents": "to_latents", "image_embedding": "encode_image"}
        encode = getattr(self.network, methods.get(column, "encode_text"))
        encode(self.batch(samples)["image" if column in methods else "text"])

    def loaded_task(self) -> Any:
        """The task with its perceptual network, which only a step needs."""
        name = self.training.needs().perceptual_network
        if name != "none":
            self.task.perceptual = perceptual_on_meta(name)
        return self.task

    def batch(self, samples: int) -> Batch:
        """All columns that a training can ask for; what the host reads is on the host."""
        needs, info, grid, condition = self.training.needs(), self.dataset_info, self.grid, self.dataset_info.condition
        conditioning: Any = getattr(self.training, "conditioning", None)
        width = getattr(conditioning, "text_states_dim", None) or info.text_states_dim
        embedding = getattr(conditioning, "image_embedding_dim", None) or info.image_embedding_dim
        with torch.device("meta"):
            batch = {"label": ids(samples), "text": ids(samples, info.text_length)}
            batch["text_states"] = batch["null_text_states"] = torch.empty(samples, info.text_states_length, width)
            for name in ("text_embedding", "null_text_embedding", "image_embedding"):
                batch[name] = torch.empty(samples, embedding)
            if condition is not None:
                batch["condition"] = ids(samples, condition.height * condition.width)
            if grid is not None:
                batch["tokens"] = ids(samples, grid.height * grid.width)
            if needs.resolution is not None:
                sides = needs.resolution, needs.resolution
                batch["image"] = torch.empty(samples, needs.channels, *sides)
                batch["condition_image"] = torch.empty(samples, 3, *sides)
        return batch | {"position": torch.arange(samples), "task": torch.zeros(samples, dtype=torch.long)}


def step_flops(training: Training, dataset_info: DatasetInfo = IMAGES, *, grid: TokenGrid | None = None) -> int:
    """Operations of one whole step; arguments and errors are those of `StepModel` and `StepModel.flops`."""
    return StepModel(training, dataset_info, grid=grid).flops()


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts the operations that are done inside."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), KnownLayouts(), counter:
        yield counter


class GradientsDone(Exception):  # noqa: N818 - it is no error
    """All gradients of a step are there."""


def take_gradients(task: Any, batch: Batch, *, step: int, backward: Callable[..., None] | None = None) -> None:
    """Take a task's own step up to its last gradient; `backward` is called in place of its learners' own."""
    learners = learners_of(task)

    def update(step: int, *, last: bool) -> tuple[None, None]:
        if last:
            raise GradientsDone
        return None, None

    with ExitStack() as stack:
        for learner in learners:
            methods = {"backward": backward} if backward else {}
            stack.enter_context(acting(learner, update=partial(update, last=learner is learners[-1]), **methods))
        stack.enter_context(suppress(GradientsDone))
        task.train_step(batch, step)


@contextmanager
def acting(actor: object, **methods: Any) -> Iterator[None]:
    """Inside, a learner or task has these methods in place of its own."""
    vars(actor).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(actor)[name]


def learners_of(task: Any) -> list[Learner]:
    """Learners of a task in the order of their last updates; the network of the last is stored."""
    return [learner for learner in (getattr(task, "discriminator", None), task.learner) if learner is not None]


@cache
def perceptual_on_meta(name: PerceptualNetwork) -> PerceptualLoss:
    """A perceptual loss without numbers. Raises PerceptualWeightsError without the package of its network."""
    if name == "vgg16_lpips":
        with without_memory():
            return PerceptualLoss(VGG16Features(), layer_weights=[torch.empty(width) for width in VGG16_CHANNELS])
    check_perceptual_network(name, weights_uri=None)
    return PerceptualLoss(EfficientNetFeatures().to("meta"))


def ids(samples: int, *shape: int) -> Tensor:
    return torch.empty(samples, *shape, dtype=torch.long, device="meta")
