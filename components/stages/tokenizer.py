"""Train the VQ-GAN tokenizer."""

from functools import partial

from components.data.held_out import held_out_arrays
from components.data.shards import load_index
from components.data.stream import training_stream
from components.stages.context import StageContext
from components.storage.artifact import Artifact
from components.training.config import TokenizerConfig
from components.training.launch import RayStream, train
from components.training.perceptual_weights import check_perceptual_network
from components.training.results import write_model
from components.training.tasks.tokenizer import TokenizerTask, autoencoder_arguments

HELD_OUT = 256  # pictures for previews and the final evaluation


def train_tokenizer(config: TokenizerConfig, context: StageContext, *, images: Artifact) -> Artifact:
    """Train on the pictures of `images`. Returns a model artifact: bundle, metrics and preview.

    Raises PerceptualWeightsError before anything is started, TrainingError later.
    """
    check_perceptual_network(config.perceptual_network)
    index, resources = load_index(images.url("index.json")), context.resources
    state = train(
        partial(TokenizerTask, config, max_batch_per_device=resources.max_batch_per_device),
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
    folder = context.scratch()
    summary = write_model(
        state,
        folder,
        kind="tokenizer",
        network=autoencoder_arguments(config),
        settings={"resolution": config.resolution},
        learner="generator.",
    )
    return context.commit("model", folder=folder, metadata={"summary": summary})
