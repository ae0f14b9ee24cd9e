"""CLIP score of images and their captions, by transformers' CLIPModel with weights by URI.

Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning": 100 max(cos, 0) of the
embeddings of an image and of its own caption (100 as the field's programs have it, 2.5 in the paper). The shorter side
of an image is resized to the network's input (bicubic), and the center is cut out; a long caption loses its end.
Shapes: N images, H W their pixels.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from components.evaluation.features import FeatureNetworkError
from components.runtime.storage.connection import StoreError
from components.sampling.device import best_device
from components.weights.features import of_transformers
from components.weights.files import read_tokenizer, read_weights

KNOWN = "a folder with config.json, model.safetensors and tokenizer.json of CLIPModel: openai/clip-vit-base-patch32"


class ClipScore:
    """Scores of pairs of an image and a caption, by one CLIPModel in fp32."""

    def __init__(self, uri: str) -> None:
        """Raises FeatureNetworkError of one line for a missing package, or weights that do not fit."""
        if find_spec("transformers") is None:
            raise FeatureNetworkError("clip_weights need transformers: pip install 'image-cascade[text]'")
        from transformers import CLIPImageProcessor, logging

        logging.disable_progress_bar()  # a fault stays one line
        try:
            file = read_weights(uri)
            # Old files hold places of tokens and patches, which are no weights.
            weights = {name: tensor for name, tensor in file.tensors.items() if not name.endswith("position_ids")}
            model = of_transformers("CLIPModel", file._replace(tensors=weights))
            self.tokens = read_tokenizer(f"{uri.rstrip('/')}/tokenizer.json").bpe
        except (ValueError, OSError, RuntimeError, StoreError) as error:
            raise FeatureNetworkError(f"clip_weights {uri}: {str(error).splitlines()[0]}; give {KNOWN}") from error
        side, self.sha256 = model.config.vision_config.image_size, file.sha256
        self.tokens.enable_truncation(model.config.text_config.max_position_embeddings)
        self.tokens.enable_padding()  # behind the end of a text, where no token sees it
        self.pixels: Any = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
        self.device = best_device()
        self.model = model.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """uint8 (N, H, W, 3) and N captions -> (N,) float64 in [0, 100]."""
        ids = torch.tensor([each.ids for each in self.tokens.encode_batch(list(captions))])
        given = self.pixels([*images], input_data_format="channels_last", return_tensors="pt")
        found = self.model(input_ids=ids.to(self.device), pixel_values=given["pixel_values"].to(self.device))
        cosine = (found.image_embeds.double() * found.text_embeds.double()).sum(dim=1)  # of length 1 each
        return 100 * cosine.clamp(min=0).cpu().numpy()
