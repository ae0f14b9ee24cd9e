"""Costs of a run on a cluster elsewhere, stage by stage, and the number of GPUs that pays.

Operations are counted (`components.training.step_model`), and a step's seconds modeled from counts (`step_time`).
Not counted are samples and evaluation, a pretrained text encoder, the time to read images, to save and to start.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from components.configuration.optimization import OptimizationConfig, Training
from components.configuration.trainings import AutoencoderTraining
from components.configuration.usage import UsageError
from components.runtime.execution import Resources
from components.stages.precompute import PrecomputeConfig
from components.stages.tokens import TokensConfig
from components.training.step_model import StepModel
from pipelines.planning import memory
from pipelines.planning.profiles import Aim, Cluster, Profile
from pipelines.planning.step_time import StepTime, encoding_work, step_time
from pipelines.workflow import Stage, Workflow

TOKEN_BYTES, ARRAY_BYTES, PIXEL_BYTES = 4, 2, 3  # of a token, of a number made before, of a pixel


class StageCost(NamedTuple):
    """Costs of a stage that computes on GPUs."""

    stage: str
    gpus: float  # at work
    step_flops: int | None  # of a whole step; None: nothing is trained
    frozen_flops: int  # of them, those of frozen networks that make columns at each step
    samples: int  # of a step; of the set, where nothing is trained
    flops: int  # of all steps
    read: int  # bytes of samples before compression
    written: int  # bytes of checkpoints and of what is left in the end
    step: memory.StepMemory | None  # on each GPU; None: nothing is trained
    time: StepTime | None  # of a step
    gpu_hours: float
    hours: float


class Choice(NamedTuple):
    """Number of workers for a training, with the seconds of a step and the hours of all."""

    workers: int
    fits: bool  # True where the workers' memory holds a sample
    time: StepTime
    hours: float

    @property
    def worker_hours(self) -> float:
        return self.workers * self.hours


def choices(stage: Stage, profile: Profile, cluster: Cluster, counts: Iterable[int]) -> list[Choice]:
    """Choices of a training among numbers of workers, on a cluster whose GPU is known."""
    gpus = float(profile.given(stage.name, "gpus_per_worker") or 1)
    model, made = memory.model_of(stage), []
    for count in counts:
        resources = profile.resources(stage.name, gpus_per_worker=gpus).model_copy(update={"num_workers": count})
        fits = memory.step_memory(model, resources).fitting(cluster.known_gpu.memory) > 0
        time = training_time(stage, resources, cluster)
        made.append(Choice(count, fits, time, time.seconds * model.training.optimization.total_steps / 3600))
    return made


def chosen(made: Sequence[Choice], aim: Aim) -> Choice:
    """The choice of an aim, among those that fit the memory if any does.
    The knee has the least product of hours and price: beyond it a percent of the hours costs more than a percent of the
    price, and twice the GPUs are taken only where they save 29 % of the time (1 - 1 / sqrt 2)."""
    aims: dict[Aim, Callable[[Choice], tuple[float, ...]]] = {
        "fastest": lambda choice: (choice.hours, choice.worker_hours),
        "cheapest": lambda choice: (choice.worker_hours, choice.hours),
        "knee": lambda choice: (choice.worker_hours * choice.hours,),
    }
    return min([choice for choice in made if choice.fits] or made, key=aims[aim])


def training_time(stage: Stage, resources: Resources, cluster: Cluster) -> StepTime:
    """Seconds of a step of a training, in the mean over all steps what products need."""
    model = memory.model_of(stage)
    frozen = [encoding_work(memory.model_of(maker), name) for name, maker in columns_of(stage).items()]
    flops = counted_flops(model).total / model.training.optimization.total_steps
    return step_time(model, resources, cluster, flops=flops, frozen=frozen, frozen_flops=frozen_flops(stage))


def frozen_flops(stage: Stage) -> int:
    """Operations of the frozen networks that make columns of a training's batch."""
    image = sum(encoding_flops(memory.model_of(maker), name) for name, maker in columns_of(stage).items())
    return image * memory.model_of(stage).training.optimization.global_batch_size


def stage_costs(
    workflow: Workflow, shares: Mapping[str, Resources], cluster: Cluster, *, images: int | None = None
) -> list[StageCost]:
    """Costs of the counted stages of `shares`, in the workflow's order, on a cluster whose GPU is known.
    `images`: of the set; None: unknown, and then the stages that go through it once are left out."""
    costs = []
    for stage in (stage for stage in workflow.stages if stage.name in shares):
        trains = isinstance(stage.config, Training) and stage.config.trains
        encoded = images if isinstance(stage.config, TokensConfig | PrecomputeConfig) else None
        if (trains or encoded) and not shares[stage.name].gpus_per_worker:
            raise UsageError(f"the profile gives {stage.name} no GPU, and so no cost on one: take --profile auto")
        if trains:
            costs.append(training_cost(stage, shares[stage.name], cluster))
        elif encoded:
            costs.append(encoding_cost(stage, shares[stage.name], cluster, images=encoded))
    return costs


def checkpoints_of(optimization: OptimizationConfig, *, hours: float) -> int:
    """Count the checkpoints of a training of so many hours, by the clock or by steps, and the last."""
    if optimization.checkpoint_minutes is not None:
        return 1 + int(60 * hours / optimization.checkpoint_minutes)
    return -(-optimization.total_steps // optimization.checkpoint_every)


def training_cost(stage: Stage, resources: Resources, cluster: Cluster) -> StageCost:
    """The cost of a training on its workers."""
    model = memory.model_of(stage)
    optimization, own = model.training.optimization, counted_flops(model)
    frozen = frozen_flops(stage)
    time = training_time(stage, resources, cluster)
    gpus = resources.gpus_per_worker * resources.num_workers
    hours = time.seconds * optimization.total_steps / 3600
    return StageCost(
        stage=stage.name,
        gpus=gpus,
        step_flops=own.step + frozen,
        frozen_flops=frozen,
        samples=optimization.global_batch_size,
        flops=own.total + frozen * optimization.total_steps,
        read=training_reads(stage),
        written=checkpoints_of(optimization, hours=hours) * memory.checkpoint_bytes(model) + memory.model_bytes(model),
        step=memory.step_memory(model, resources),
        time=time,
        gpu_hours=gpus * hours,
        hours=hours,
    )


def encoding_cost(stage: Stage, resources: Resources, cluster: Cluster, *, images: int) -> StageCost:
    """Counts the cost of a stage in which frozen networks go through the set once."""
    if isinstance(stage.config, PrecomputeConfig):
        names = stage.config.columns
        makers = {name: maker for name in names if (maker := maker_of(stage, name)) is not None}
        width = sum(column_bytes(stage, name) for name in names)
    else:
        makers = {"tokens": source_of(stage, "tokenizer")}
        grid = memory.model_of(makers["tokens"]).training.token_grid
        assert grid is not None  # the stage makes tokens
        width = grid.height * grid.width * TOKEN_BYTES
    models, gpu = {name: memory.model_of(maker) for name, maker in makers.items()}, cluster.known_gpu
    flops = sum(encoding_flops(model, name) for name, model in models.items()) * images
    moved = sum(encoding_work(model, name).moved.sample for name, model in models.items()) * images
    gpu_hours = (flops / (gpu.peak * gpu.products) + moved / gpu.bandwidth) / 3600
    gpus, read = resources.gpus_per_worker * resources.num_actors, PIXEL_BYTES * memory.images_of(stage).resolution ** 2
    costs = (flops, images * read, images * width, None, None, gpu_hours, gpu_hours / gpus)
    return StageCost(stage.name, gpus, None, 0, images, *costs)


counted_flops = cache(StepModel.training_flops)  # of a training, counted once
encoding_flops = cache(StepModel.encoding_flops)  # of a frozen network for a column of a sample


def columns_of(stage: Stage) -> dict[str, Stage]:
    """Trainings of the frozen networks that make columns at each step, by column.
    Contrastive states and embedding of a text are one pass."""
    conditioning = getattr(stage.config, "conditioning", None)
    names = ["latents", *(conditioning.conditions if conditioning else ())]
    names += ["image_embedding"] if stage.name == "diffusion_prior" else []
    source = stage.inputs.get("images")
    stored = source.config.columns if isinstance(source, Stage) and isinstance(source.config, PrecomputeConfig) else ()
    columns = {name: maker for name in names if name not in stored and (maker := maker_of(stage, name)) is not None}
    if "text_states" in columns and columns.get("text_embedding") is columns["text_states"]:
        del columns["text_embedding"]
    return columns


def maker_of(stage: Stage, column: str) -> Stage | None:
    """The training that makes a column; None for a column of the set or of a pretrained encoder."""
    texts = ("text_states", "text_embedding")
    if column not in ("latents", *texts, "image_embedding") or (column in texts and "text_encoder" in stage.inputs):
        return None
    name = "autoencoder" if column == "latents" else "contrastive"
    return source_of(stage, name) if name in stage.inputs else None


def source_of(stage: Stage, name: str) -> Stage:
    """The input stage of a stage under a name."""
    source = stage.inputs[name]
    assert isinstance(source, Stage)
    return source


def column_bytes(stage: Stage, name: str) -> int:
    """Bytes of a column of a sample, as `precompute` stores the column."""
    info = memory.assumed_dataset_info(stage)
    if name == "text_states":
        return info.text_states_length * info.text_states_dim * ARRAY_BYTES
    if name != "latents":
        return info.image_embedding_dim * ARRAY_BYTES
    autoencoder = source_of(stage, "autoencoder").config
    assert isinstance(autoencoder, AutoencoderTraining)
    side = autoencoder.data.resolution // autoencoder.network.factor
    return autoencoder.network.diffused_channels * side**2 * ARRAY_BYTES


def training_reads(stage: Stage) -> int:
    """Bytes of the samples of all steps, before compression.
    Tokens, or 8-bit pixels of the side that the set keeps."""
    assert isinstance(stage.config, Training)
    image_set, optimization = memory.images_of(stage), stage.config.optimization
    samples = optimization.total_steps * optimization.global_batch_size
    grids = [grid for name in ("tokens", "condition") if (grid := memory.tokens_of(stage, name)) is not None]
    if grids:
        return samples * TOKEN_BYTES * (sum(g.height * g.width for g in grids) + image_set.text_length)
    source, arrays, side = stage.inputs.get("images"), 0, image_set.resolution
    if isinstance(source, Stage) and isinstance(once := source.config, PrecomputeConfig):
        arrays = sum(column_bytes(source, name) for name in once.columns)
        side = 0 if "latents" in once.columns else once.kept
    return samples * (arrays + PIXEL_BYTES * side**2)


def longest_path(workflow: Workflow, costs: Sequence[StageCost]) -> tuple[list[str], float]:
    """The chain of stages with the most hours, first to last, and the chain's hours."""
    hours, paths = {cost.stage: cost.hours for cost in costs}, dict[str, tuple[list[str], float]]()
    for stage in workflow.stages:
        longest = [paths[parent.name] for parent in stage.parents.values()]
        before = max(longest, key=lambda path: path[1], default=([], 0.0))
        own = [stage.name] if stage.name in hours else []
        paths[stage.name] = ([*before[0], *own], before[1] + hours.get(stage.name, 0.0))
    return max(paths.values(), key=lambda path: path[1])
