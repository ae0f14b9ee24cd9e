"""CLIP score of images and captions, by a CLIPModel of transformers or of open_clip.

Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning": 100 max(cos, 0) of the
embeddings of an image and of its own caption (100 as the field's programs have it, 2.5 in the paper). A long caption
loses its end. Images are prepared as by CLIP's own program and open_clip, with and without torchvision.
Shapes: N images, H W their pixels.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from components.evaluation.features import FeatureNetworkError
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import absolute
from components.sampling.device import best_device
from components.weights.features import of_transformers
from components.weights.files import read_tokenizer, read_weights
from components.weights.open_clip import MARK, STATED, as_clip_model

KNOWN = (
    "a folder with tokenizer.json and CLIPModel's config.json and model.safetensors (openai/clip-vit-base-patch32), or "
    f"open_clip's {STATED} and open_clip_model.safetensors (laion/CLIP-ViT-B-32-laion2B-s34B-b79K)"
)
SCALING = {  # CLIP's own
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
SIZES = {768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}  # of a vision transformer, by its width
USUAL_SIDE = 224  # pixels


class ClipScore:
    """Scores of pairs of an image and a caption, by one CLIPModel in fp32."""

    def __init__(self, uri: str) -> None:
        """Raises FeatureNetworkError of one line for a missing package, or weights that do not fit."""
        if find_spec("transformers") is None:
            raise FeatureNetworkError("clip_weights need transformers: pip install 'image-cascade[text]'")
        from transformers import logging

        logging.disable_progress_bar()  # a fault stays one line
        try:
            file, scaling = read_weights(uri), SCALING
            folder = uri.rstrip("/").removesuffix(file.uri.rpartition("/")[2]).rstrip("/") or "."
            if MARK in file.tensors:
                file, stated = as_clip_model(file, absolute(folder))
                scaling = SCALING | stated
            # Old files hold places of tokens and patches, which are no weights.
            weights = {name: tensor for name, tensor in file.tensors.items() if not name.endswith("position_ids")}
            model = of_transformers("CLIPModel", file._replace(tensors=weights))
            self.tokens = read_tokenizer(f"{folder}/tokenizer.json").bpe
        except (ValueError, OSError, RuntimeError, StoreError) as error:
            raise FeatureNetworkError(f"clip_weights {uri}: {str(error).splitlines()[0]}; give {KNOWN}") from error
        vision = model.config.vision_config
        self.side, self.sha256 = vision.image_size, file.sha256
        # Scores of two networks can't be compared: `clip_score_vit_l_14`, `clip_score_vit_l_14_336`.
        name = f"clip_score_vit_{SIZES.get(vision.hidden_size, vision.hidden_size)}_{vision.patch_size}"
        self.name = name + f"_{self.side}" * (self.side != USUAL_SIDE)
        self.mean, self.deviation = (np.array(scaling[name], np.float32) for name in ("mean", "std"))
        self.tokens.enable_truncation(model.config.text_config.max_position_embeddings)
        self.tokens.enable_padding()  # behind the end of a text, where no token sees it
        self.device = best_device()
        self.model = model.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """uint8 (N, H, W, 3) and N captions -> (N,) float64 in [0, 100]."""
        ids = torch.tensor([each.ids for each in self.tokens.encode_batch(list(captions))])
        scaled = (prepared(images, self.side) / np.float32(255) - self.mean) / self.deviation
        pixels = rearrange(torch.from_numpy(scaled), "n h w c -> n c h w").to(self.device)
        found = self.model(input_ids=ids.to(self.device), pixel_values=pixels)
        cosine = (found.image_embeds.double() * found.text_embeds.double()).sum(dim=1)  # of length 1 each
        return 100 * cosine.clamp(min=0).cpu().numpy()


def prepared(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> (N, side, side, 3): the shorter side resized, the center cut out.
    Bicubic by Pillow, and rounded as CLIP's own program does (Radford et al., 2021)."""
    height, width = images.shape[1:3]
    size = [side * each // min(height, width) for each in (width, height)]
    left, top = (round((each - side) / 2) for each in size)
    resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return np.stack(resized)[:, top : top + side, left : left + side]
