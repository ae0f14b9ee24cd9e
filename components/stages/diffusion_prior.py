"""Train DALL-E 2's diffusion prior over the embeddings of a contrastive encoder."""

from typing import Any

from components.data.shards import BPE, load_index, read_bpe
from components.stages.context import StageContext
from components.stages.training import frozen_networks, train_on_images
from components.storage.artifact import Artifact
from components.training.config import DatasetInfo
from components.training.contrastive_config import DiffusionPriorConfig
from components.training.results import ModelDescription
from components.training.tasks.diffusion_prior import DiffusionPriorTask, diffusion_prior_arguments, prior_objective

SAMPLING = {"sampler", "num_inference_steps", "guidance_scale", "candidates"}


def train_diffusion_prior(
    config: DiffusionPriorConfig, context: StageContext, *, images: Artifact, contrastive: Artifact
) -> Artifact:
    """Train on the images and captions of `images` as `contrastive` sees them. Returns a model artifact.

    Raises ValueError, before anything is started, if that is no contrastive encoder, or sees larger images or texts
    of another tokenizer; TrainingError later.
    """
    index = load_index(images.url("index.json"))
    columns = ("image_embedding", *config.conditions)
    frozen, given = frozen_networks(columns, images, index, resolution=config.resolution, contrastive=contrastive)
    dataset_info = DatasetInfo(num_classes=len(index.classes), **frozen.sizes)
    how: dict[str, Any] = {"dataset_info": dataset_info, "load_encoders": frozen.load_encoders, "arrays": given}
    settings = {"role": "diffusion_prior", "objective": prior_objective(config), **config.model_dump(include=SAMPLING)}
    network = diffusion_prior_arguments(config, dataset_info)
    model = ModelDescription("diffusion_prior", network, settings, texts={BPE: read_bpe(index)})
    return train_on_images(DiffusionPriorTask, config, context, index, model=model, **how)
