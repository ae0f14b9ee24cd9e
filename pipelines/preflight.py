"""What a recipe needs of this machine, asked before anything starts."""

from components.evaluation.features import FeatureNetworkError, check_feature_network
from components.training.perceptual_weights import PerceptualWeightsError, check_perceptual_network
from pipelines.profiles import Profile
from pipelines.recipes.cascade import CascadeRecipe
from pipelines.workflow import UsageError


def check_parts(recipe: CascadeRecipe) -> None:
    """Raise UsageError if a network that the recipe names can't be had here."""
    try:
        check_perceptual_network(recipe.tokenizer.perceptual_network)
        check_feature_network(recipe.evaluation.feature_network)
    except (PerceptualWeightsError, FeatureNetworkError) as error:
        raise UsageError(str(error)) from error


def check_batches(recipe: CascadeRecipe, profile: Profile, *, cluster: dict[str, float], branches: int) -> None:
    """Raise UsageError if the workers of a training can't share its global batch equally."""
    trainings = {"tokenizer": recipe.tokenizer, "prior": recipe.prior, "base": recipe.base}
    trainings |= {f"upsampler_{upsampler.resolution}": upsampler for upsampler in recipe.upsamplers}
    for stage, config in trainings.items():
        workers = profile.resources(stage, cluster=cluster, branches=branches).num_workers
        if config.global_batch_size % workers:
            size = config.global_batch_size
            raise UsageError(
                f"{stage}.global_batch_size {size} can't be shared by {workers} workers; change one of them"
            )
