"""Train one diffusion model: the base, or an upsampler."""

from functools import partial
from typing import Any

from components.data.held_out import held_out_arrays
from components.data.shards import BPE, load_index, read_bpe
from components.data.stream import training_stream
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.training.config import Conditions, DiffusionConfig
from components.training.launch import RayStream, train
from components.training.results import write_model
from components.training.tasks.diffusion import DiffusionTask, unet_arguments

HELD_OUT = 256  # pictures for previews and the final evaluation


def train_diffusion(config: DiffusionConfig, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the pictures of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises TrainingError if the losses stop being finite or workers fail too often.
    """
    index, resources = load_index(images.url("index.json")), context.resources
    offers = Conditions(
        num_classes=len(index.classes), vocab_size=index.text.vocab_size, text_length=index.text.text_length
    )
    state = train(
        partial(DiffusionTask, config, offers=offers, max_batch_per_device=resources.max_batch_per_device),
        config=config,
        stage=context.stage,
        key=context.key,
        folder=context.train_store,
        stream=RayStream(
            partial(
                training_stream,
                index,
                resolution=config.resolution,
                global_batch_size=config.global_batch_size,
                world_size=resources.num_workers,
                seed=config.seed,
                total_steps=config.total_steps,
                reader_cpus=resources.reader_cpus,
            )
        ),
        held_out=partial(held_out_arrays, index, resolution=config.resolution, limit=HELD_OUT),
        recorder=context.recorder,
        resources=resources,
        scratch=context.scratch(),
    )
    folder, network = context.scratch(), unet_arguments(config, offers)
    summary = write_model(state, folder, kind="diffusion", network=network, settings=settings(config, index.classes))
    if "text" in config.conditions:
        (folder / BPE).write_text(read_bpe(index))
    return context.commit("model", folder=folder, metadata={"summary": summary})


def settings(config: DiffusionConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What sampling needs to know."""
    base = {
        "role": "base" if config.low_res_resolution is None else "upsampler",
        "resolution": config.resolution,
        "schedule": {"name": config.schedule, "num_train_timesteps": config.num_train_timesteps},
        "prediction_type": config.prediction_type,
        "sampler": config.sampler,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "classes": list(classes),
    }
    if config.low_res_resolution is None:
        return base
    return base | {"low_res_resolution": config.low_res_resolution, "noise_level": config.noise_level}
