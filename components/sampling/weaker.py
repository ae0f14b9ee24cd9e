"""Which model is a weaker version of another, that can guide it (autoguidance; Karras et al., 2024, "Guiding a
Diffusion Model with a Bad Version of Itself").
"""

from components.sampling.classifier import PROCESS
from components.sampling.model import SamplingModel

OUTPUT = (*PROCESS, "prediction_type")  # what decides the meaning of an output
TOLD = ("num_classes", "text", "text_states_dim", "image_embedding_dim", "condition_image_channels")
SHAPE = ("in_channels", *TOLD)


def check_weaker(weaker: SamplingModel, model: SamplingModel) -> None:
    """Raise ValueError, in one line, if one is no weaker version of the other: another output, image or condition."""
    pairs = {name: [each.settings["objective"].get(name) for each in (weaker, model)] for name in OUTPUT}
    pairs |= {"resolution": [each.settings["resolution"] for each in (weaker, model)]}
    pairs |= {name: [each.network.get(name) for each in (weaker, model)] for name in SHAPE}
    different = [name for name, (one, other) in pairs.items() if one != other]
    if different:
        raise ValueError(
            f"the model of stage {weaker.name} can't guide {model.name}: they differ in {', '.join(different)}"
        )
