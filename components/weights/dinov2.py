"""DINOv2 as a feature network (FD-DINOv2), by transformers' own class and the URI of a folder.

Stein et al., 2023, "Exposing Flaws of Generative Model Evaluation Metrics and Their Unfair Treatment of Diffusion
Models", measure in the class token of DINOv2 ViT-L/14 (Oquab et al., 2023). From pixels to features as torch-fidelity:
resized to 224² as TensorFlow 1 did, scaled by ImageNet's means and deviations, the class token after the last norm.
torch-fidelity's own class loads code over the network, and refuses weights by a path.

transformers stretches the embeddings of places to 224² without the 0.1 that the first code of DINOv2 adds to the size,
so features differ from that code's by about one in a thousand.

Shapes: N images, H W their pixels, D features: 1024 of ViT-L/14.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.weights.files import WeightsFile
from components.weights.inception import resized_as_tensorflow

SIDE = 224  # pixels of the network's input
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images in [0, 1]
LEVELS = 255
KNOWN = "a folder with config.json and model.safetensors of Dinov2Model: facebook/dinov2-large, as papers measure in"


class Dinov2(nn.Module):
    """The class token of images by a Dinov2Model of any size."""

    def __init__(self, file: WeightsFile) -> None:
        """Raises ValueError for the folder of another model, or tensors that are missing or of other shapes."""
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        if file.config.get("model_type") != "dinov2":
            raise ValueError("its config.json is no dinov2's")
        given = {"config": Dinov2Config.from_dict(file.config), "state_dict": file.tensors}
        loaded: Any = Dinov2Model.from_pretrained(None, **given, output_loading_info=True)  # it renames what files hold
        self.model, found = loaded
        faults = {
            kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        for kind, names in faults.items():
            if names:
                raise ValueError(f"{kind.replace('_', ' ')}: {names[0]}, {len(names)} in all")
        self.model.requires_grad_(False)
        self.register_buffer("shift", LEVELS * torch.tensor(MEAN)[:, None, None])
        self.register_buffer("scale", LEVELS * torch.tensor(DEVIATION)[:, None, None])

    def forward(self, images: np.ndarray) -> dict[str, Tensor]:
        """uint8 (N, H, W, 3) -> `features` (N, D)."""
        image = resized_as_tensorflow(images, SIDE, like=self.shift)
        return {"features": self.model((image - self.shift) / self.scale).pooler_output}
