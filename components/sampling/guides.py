"""Models that guide a sampler: a classifier of noisy images, or a weaker model (autoguidance).

Autoguidance is of Karras et al., 2024, "Guiding a Diffusion Model with a Bad Version of Itself".

Shapes: B images, K classes, H W pixels.
"""

import torch
from torch import Tensor

from components.models.diffusion import guidance
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import Score
from components.sampling.model import SamplingModel

PROCESS = ("kind", "schedule", "beta_start", "beta_end", "num_train_timesteps", "zero_terminal_snr", "sigma_data")
OUTPUT = (*PROCESS, "prediction_type")  # what decides the meaning of an output
CONDITIONS = ("num_classes", "text", "text_states_dim", "image_embedding_dim", "condition_image_channels")
SHAPE = ("in_channels", *CONDITIONS)


def classifier_score(model: SamplingModel, labels: Tensor, scale: float) -> Score:
    """Classifier guidance: scale times the gradient of log p(label | x_t) at x_t.

    Source: Dhariwal and Nichol, 2021, section 4.1.

    Args:
        model: a classifier of noisy images, trained with the schedule of the model that it guides.
        labels: (B,) int64, class ids of the classifier; its num_classes is the null label, which pulls nowhere.
        scale: 0 is no guidance; 1 samples from the product of both models.

    Raises ValueError for a classifier of clean images.
    """
    if not model.settings["noisy"]:
        raise ValueError(f"the classifier of stage {model.name} knows clean images only and can't guide")
    objective, num_classes = make_objective(model.settings["objective"]), int(model.network["num_classes"])
    labels = labels.to(model.device)
    each = scale * (labels < num_classes)  # (B,)
    return guidance.classifier_score(objective, model.module, labels.clamp(max=num_classes - 1), each)


def check_guides(classifier: SamplingModel, model: SamplingModel) -> None:
    """Raise ValueError, in one line, if the classifier can't guide the diffusion model.

    Noise, images and classes must be the same. Training may draw their times differently, and what the network predicts
    is its own affair.
    """
    if not classifier.settings["noisy"]:
        raise ValueError(f"the classifier of stage {classifier.name} knows clean images only and can't guide")
    of_classifier, of_model = (
        {name: each.settings["objective"].get(name) for name in PROCESS} for each in (classifier, model)
    )
    for settings, each in ((of_classifier, classifier), (of_model, model)):
        settings["resolution"] = each.settings["resolution"]
        settings["classes"] = each.settings["classes"]
    different = [name for name in of_classifier if of_classifier[name] != of_model[name]]
    if different:
        raise ValueError(
            f"the classifier of stage {classifier.name} can't guide {model.name}: they differ in {', '.join(different)}"
        )


@torch.no_grad()
def class_log_probabilities(model: SamplingModel, images: Tensor) -> Tensor:
    """log p(class | image), (B, K) fp32, of finished images (B, 3, H, W) in [-1, 1]."""
    objective, images = make_objective(model.settings["objective"]), images.to(model.device)
    first = objective.times(torch.zeros(len(images), device=model.device))
    return objective.apply(model.module, images, first).float().log_softmax(dim=1)


def check_weaker(weaker: SamplingModel, model: SamplingModel) -> None:
    """Raise ValueError, in one line, unless `weaker` is a weaker version of the model.

    Output, image and conditions must be the same.
    """
    pairs = {name: [each.settings["objective"].get(name) for each in (weaker, model)] for name in OUTPUT}
    pairs |= {"resolution": [each.settings["resolution"] for each in (weaker, model)]}
    pairs |= {name: [each.network.get(name) for each in (weaker, model)] for name in SHAPE}
    different = [name for name, (one, other) in pairs.items() if one != other]
    if different:
        raise ValueError(
            f"the model of stage {weaker.name} can't guide {model.name}: they differ in {', '.join(different)}"
        )
