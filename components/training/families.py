"""Training tasks by model family: the columns of `configuration.families.FAMILIES` with torch."""

from collections.abc import Callable, Sequence
from functools import partial

from components.configuration.conditions import IMAGES, DatasetInfo, TokenGrid
from components.configuration.families import family_name
from components.configuration.optimization import Training
from components.models.autoencoder import Autoencoder
from components.training.frozen import LoadEncoder
from components.training.loop import Task
from components.training.tasks.autoencoder import AutoencoderTask
from components.training.tasks.diffusion import DiffusionPriorTask, diffusion_task
from components.training.tasks.gan import GANTask
from components.training.tasks.prior import MaskedPriorTask, PixelTask, PriorTask
from components.training.tasks.recognition import ClassifierTask, ContrastiveTask

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
        load_tokenizer: loads the network from tokens to images, for previews; None: no previews.
    """
    make = partial(TASKS[family_name(training.network.kind)], training, dataset_info=dataset_info, grid=grid)
    return partial(make, load_encoders=load_encoders, load_tokenizer=load_tokenizer)
