"""Costs of a run on a cluster elsewhere: operations, hours, bytes and a price, stage by stage.

Operations are counted (`components.training.step_model`), hours follow from the peak of the GPU and from how much of it
one expects to use, which no one knows before it is measured. What is not counted: samples and evaluation, a pretrained
text encoder, the time to read images, to save and to start.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from components.configuration.optimization import OptimizationConfig, Training
from components.configuration.trainings import AutoencoderTraining
from components.configuration.usage import UsageError, nearest
from components.runtime.execution import Resources
from components.stages.precompute import PrecomputeConfig
from components.stages.tokens import TokensConfig
from components.training.reporting import PEAK_TFLOPS
from components.training.step_model import StepModel
from pipelines.planning.memory import (
    StepMemory,
    assumed_dataset_info,
    checkpoint_bytes,
    images_of,
    model_bytes,
    model_of,
    scheduled,
    step_memory,
    tokens_of,
)
from pipelines.planning.shares import gpus_of
from pipelines.workflow import Stage, Workflow

UTILIZATION = 0.35  # of the peak: ADM reports 0.29 to 0.41 for its models on V100s (Dhariwal and Nichol, 2021, table 7)
TOKEN_BYTES, ARRAY_BYTES, PIXEL_BYTES = 4, 2, 3  # of a token or word, of a number that was made before, of a pixel


class GPU(NamedTuple):
    """Figures of a GPU's data sheet, without sparsity."""

    peak: float  # FLOP/s of dense matrix products in bf16
    memory: float  # bytes


# NVIDIA's data sheets and product pages of each; where they state the peak with sparsity, half of it.
GPUS = {
    "a100": GPU(PEAK_TFLOPS[("A100",)] * 1e12, 80e9),  # SXM or PCIe, 80 GB
    "h100": GPU(PEAK_TFLOPS[("H100",)] * 1e12, 80e9),  # SXM; 1,979 with sparsity
    "h200": GPU(PEAK_TFLOPS[("H200",)] * 1e12, 141e9),  # SXM; 1,979 with sparsity
    "l4": GPU(PEAK_TFLOPS[("L4",)] * 1e12, 24e9),  # 242 with sparsity
    "l40s": GPU(PEAK_TFLOPS[("L40S",)] * 1e12, 48e9),  # 733 with sparsity
}


class Rate(NamedTuple):
    """Work and price of an hour of a GPU."""

    gpu: GPU
    utilization: float = UTILIZATION
    price: float | None = None  # of an hour of one GPU, in whatever currency

    def gpu_hours(self, flops: float) -> float:
        return flops / (self.gpu.peak * self.utilization) / 3600


class StageCost(NamedTuple):
    """Costs of a stage that computes on GPUs."""

    stage: str
    gpus: float  # at work
    step_flops: int | None  # of a whole step; None: nothing is trained
    frozen_flops: int  # of them, those of frozen networks that make columns at each step
    samples: int  # of a step; of the set, where nothing is trained
    flops: int  # of all steps
    read: int | None  # bytes of samples before compression; None: the set's size is unknown
    written: int  # bytes of checkpoints and of what is left in the end
    step: StepMemory | None  # on each GPU; None: nothing is trained
    gpu_hours: float
    hours: float


def rate_of(gpu: str, *, utilization: float = UTILIZATION, price: float | None = None) -> Rate:
    """The rate of a GPU by name. Raises UsageError for an unknown GPU and numbers that can't be."""
    if gpu not in GPUS:
        raise UsageError(f"--gpu: unknown {gpu!r}{nearest(gpu, GPUS)}")
    if not 0 < utilization <= 1:
        raise UsageError(f"--mfu must be above 0 and at most 1, a share of the GPU's peak, not {utilization:g}")
    if price is not None and price < 0:
        raise UsageError(f"--price must be at least 0, of an hour of one GPU, not {price:g}")
    return Rate(GPUS[gpu], utilization, price)


def stage_costs(
    workflow: Workflow, shares: Mapping[str, Resources], rate: Rate, *, images: int | None = None
) -> list[StageCost]:
    """Costs of the counted stages of `shares`, in the workflow's order.
    `images`: of the set; None: unknown, and then the stages that go through it once are left out."""
    costs, stages = [], workflow.stages
    for stage in (stage for stage in stages if stage.name in shares):
        if isinstance(stage.config, Training):
            costs.append(training_cost(stage, stages, shares[stage.name], rate, images=images))
        elif isinstance(stage.config, TokensConfig | PrecomputeConfig) and images:
            costs.append(encoding_cost(stage, stages, shares[stage.name], rate, images=images))
    return costs


def checkpoints_of(optimization: OptimizationConfig, *, hours: float) -> int:
    """Count the checkpoints of a training of so many hours, by the clock or by steps, and the last."""
    if optimization.checkpoint_minutes is not None:
        return 1 + int(60 * hours / optimization.checkpoint_minutes)
    return scheduled(optimization)


def training_cost(
    stage: Stage, stages: Sequence[Stage], resources: Resources, rate: Rate, *, images: int | None = None
) -> StageCost:
    """Counts the cost of a training on the training's workers."""
    model = model_of(stage, stages)
    optimization, own = model.training.optimization, counted_flops(model)
    makers = {name: model_of(maker, stages) for name, maker in columns_of(stage).items()}
    frozen = sum(encoding_flops(maker, name) for name, maker in makers.items()) * optimization.global_batch_size
    flops = own.total + frozen * optimization.total_steps
    gpu_hours, gpus = rate.gpu_hours(flops), gpus_of(resources)
    checkpoints = checkpoints_of(optimization, hours=gpu_hours / gpus)
    return StageCost(
        stage=stage.name,
        gpus=gpus,
        step_flops=own.step + frozen,
        frozen_flops=frozen,
        samples=optimization.global_batch_size,
        flops=flops,
        read=training_reads(stage, stages, images=images, workers=resources.num_workers),
        written=checkpoints * checkpoint_bytes(model) + model_bytes(model),
        step=step_memory(stage, stages, resources),
        gpu_hours=gpu_hours,
        hours=gpu_hours / gpus,
    )


def encoding_cost(stage: Stage, stages: Sequence[Stage], resources: Resources, rate: Rate, *, images: int) -> StageCost:
    """Counts the cost of a stage in which frozen networks go through the set once."""
    if isinstance(stage.config, PrecomputeConfig):
        names = stage.config.columns
        makers = {name: maker for name in names if (maker := maker_of(stage, name)) is not None}
        width = sum(column_bytes(stage, name, stages) for name in names)
    else:
        makers = {"tokens": source_of(stage, "tokenizer")}
        config = makers["tokens"].config
        grid = config.token_grid if isinstance(config, Training) else None
        assert grid is not None  # the stage makes tokens
        width = grid.height * grid.width * TOKEN_BYTES
    flops = sum(encoding_flops(model_of(maker, stages), name) for name, maker in makers.items()) * images
    gpu_hours, read = rate.gpu_hours(flops), images * PIXEL_BYTES * images_of(stages).resolution ** 2
    written, gpus = images * width, gpus_of(resources)
    return StageCost(stage.name, gpus, None, 0, images, flops, read, written, None, gpu_hours, gpu_hours / gpus)


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


def column_bytes(stage: Stage, name: str, stages: Sequence[Stage]) -> int:
    """Bytes of a column of a sample, as `precompute` stores the column."""
    info = assumed_dataset_info(stage, stages)
    if name == "text_states":
        return info.text_states_length * info.text_states_dim * ARRAY_BYTES
    if name != "latents":
        return info.image_embedding_dim * ARRAY_BYTES
    autoencoder = source_of(stage, "autoencoder").config
    assert isinstance(autoencoder, AutoencoderTraining)
    side = autoencoder.data.resolution // autoencoder.network.factor
    return autoencoder.network.diffused_channels * side**2 * ARRAY_BYTES


def training_reads(stage: Stage, stages: Sequence[Stage], *, images: int | None, workers: int) -> int | None:
    """Bytes read by all workers; None where the number of `images` is needed and unknown.
    Each worker reads all tokens once. Images are read for each sample of each step, as 8-bit pixels of the side that
    the set keeps, before compression."""
    assert isinstance(stage.config, Training)
    grid, image_set, optimization = tokens_of(stage, "tokens"), images_of(stages), stage.config.optimization
    if grid is not None:
        row = (grid.height * grid.width + image_set.text_length) * TOKEN_BYTES
        return None if images is None else images * row * workers
    source, arrays, side = stage.inputs.get("images"), 0, image_set.resolution
    if isinstance(source, Stage) and isinstance(once := source.config, PrecomputeConfig):
        arrays = sum(column_bytes(source, name, stages) for name in once.columns)
        side = 0 if "latents" in once.columns else once.kept
    return optimization.total_steps * optimization.global_batch_size * (arrays + PIXEL_BYTES * side**2)


def longest_path(workflow: Workflow, costs: Sequence[StageCost]) -> tuple[list[str], float]:
    """The chain of stages with the most hours, first to last, and the chain's hours."""
    hours, paths = {cost.stage: cost.hours for cost in costs}, dict[str, tuple[list[str], float]]()
    for stage in workflow.stages:
        longest = [paths[parent.name] for parent in stage.parents.values()]
        before = max(longest, key=lambda path: path[1], default=([], 0.0))
        own = [stage.name] if stage.name in hours else []
        paths[stage.name] = ([*before[0], *own], before[1] + hours.get(stage.name, 0.0))
    return max(paths.values(), key=lambda path: path[1])
