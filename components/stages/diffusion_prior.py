"""Train DALL-E 2's diffusion prior over the embeddings of a contrastive encoder."""

from typing import Any

from components.data.shards import BPE, load_index, read_bpe
from components.stages.context import StageContext
from components.stages.training import frozen_networks, train_on_pictures
from components.storage.artifact import Artifact
from components.training.config import Conditions
from components.training.contrastive_config import DiffusionPriorConfig
from components.training.results import ModelDescription
from components.training.tasks.diffusion_prior import DiffusionPriorTask, diffusion_prior_arguments, prior_objective

SAMPLING = {"sampler", "num_inference_steps", "guidance_scale", "candidates"}


def train_diffusion_prior(
    config: DiffusionPriorConfig, context: StageContext, *, images: Artifact, contrastive: Artifact
) -> Artifact:
    """Train on the pictures and captions of `images` as `contrastive` sees them. Returns a model artifact.

    Raises ValueError, before anything is started, if that is no contrastive encoder, or sees larger pictures or texts
    of another tokenizer; TrainingError later.
    """
    index = load_index(images.url("index.json"))
    columns = ("image_embedding", *config.conditions)
    frozen, given = frozen_networks(columns, images, index, resolution=config.resolution, contrastive=contrastive)
    offers = Conditions(num_classes=len(index.classes), **frozen.sizes)
    how: dict[str, Any] = {"offers": offers, "load_encoders": frozen.load_encoders, "arrays": given}
    settings = {"role": "diffusion_prior", "objective": prior_objective(config), **config.model_dump(include=SAMPLING)}
    network = diffusion_prior_arguments(config, offers)
    model = ModelDescription("diffusion_prior", network, settings, texts={BPE: read_bpe(index)})
    return train_on_pictures(DiffusionPriorTask, config, context, index, model=model, **how)
