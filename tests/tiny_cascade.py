"""A whole cascade of tiny networks with random weights: base 8², upsampler to 16², tokenizer and prior at 16²."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.runtime.storage.artifact import Artifact, commit_artifact, describe, load_artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import compose
from components.sampling.image_files import SPECIAL_TOKENS

CLASSES = ["animals", "food", "flags"]
TEXT_LENGTH = 8
VOCAB_SIZE = 280
TEXT = {"vocab_size": VOCAB_SIZE, "context_length": TEXT_LENGTH, "model_dim": 8, "num_layers": 1, "num_heads": 2}
UNET = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4], "head_dim": 8}
UNET |= {"num_classes": len(CLASSES), "text": TEXT}
OBJECTIVE = {"kind": "discrete", "schedule": "cosine", "num_train_timesteps": 50, "prediction_type": "v_prediction"}
DIFFUSION = {"objective": OBJECTIVE, "classes": CLASSES}
LOW_RES = {"low_res_resolution": 8, "max_noise_level": 20, "augmentation_schedule": "cosine", "augmentation_steps": 50}
UPSAMPLER = {"role": "upsampler", "resolution": 16, **LOW_RES}
FEW = {"sampler": "ddpm", "num_inference_steps": 4}
SAMPLING = {"base": FEW, "upsampler_16": FEW | {"sampler": "ddim", "noise_level": 5}}
TOKENIZER = {"resolution": 16, "channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
TOKENIZER |= {"attention_resolutions": [], "latent_channels": 8}
TOKENIZER |= {"bottleneck": {"kind": "vq_ema", "codebook_size": 32, "codebook_dim": 4}}
PRIOR = {"codebook_size": 32, "num_tokens": 16, "model_dim": 16, "num_layers": 2, "num_heads": 2}
PRIOR |= {"num_classes": len(CLASSES), "vocab_size": VOCAB_SIZE, "text_length": TEXT_LENGTH}


def write_models(folder: Path) -> dict[str, Path]:
    """A folder for each model: stage name -> folder."""
    return {
        "tokenizer": write_model(folder / "tokenizer", "autoencoder", TOKENIZER, {"resolution": 16}),
        "prior": write_model(folder / "prior", "transformer", PRIOR, {"grid": [4, 4], "classes": CLASSES}),
        "base": write_model(
            folder / "base",
            "unet",
            UNET | {"resolution": 8},
            DIFFUSION | {"role": "base", "resolution": 8, "prompts": ["red apple", "red flag"]},
        ),
        "upsampler_16": write_model(
            folder / "upsampler_16", "unet", UNET | {"resolution": 16, "low_res": True}, DIFFUSION | UPSAMPLER
        ),
    }


def write_cascade(folder: Path) -> Path:
    """The composed cascade of `write_models`."""
    parts = write_models(folder / "models")
    upsamplers = {"upsampler_16": parts.pop("upsampler_16")}
    return compose(folder / "cascade", **parts, upsamplers=upsamplers, sampling=SAMPLING)


def commit_model(root: Path, stage: str, key: str, folder: Path, **inputs: str) -> Artifact:
    """A model's folder as an artifact in storage, as a stage commits it; `inputs`: their keys."""
    store = Store(str(root / "stages" / stage / key))
    files = []
    for local in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = f"files/{local.relative_to(folder).as_posix()}"
        store.upload(local, path)
        files.append(describe(local, path))
    known = {"files": tuple(files), "inputs": inputs, "provenance": {"git_commit": "abc123"}}
    return commit_artifact(store, Artifact(kind="model", stage=stage, key=key, **known))


def artifact_in(folder: Path | str) -> Artifact:
    """The artifact that is there."""
    artifact = load_artifact(Store(str(folder)))
    assert artifact is not None
    return artifact


def write_model(folder: Path, kind: str, network: dict[str, Any], settings: dict[str, Any]) -> Path:
    torch.manual_seed(len(folder.name))
    module = NETWORKS[kind](**network)
    for name, parameter in module.named_parameters():
        if "conv_out" in name or "conv_2" in name or "head" in name:  # zero at first: every image would be the same
            nn.init.normal_(parameter, std=0.3)
    save_bundle(folder, ModelBundle(kind, network, settings, module))
    if kind != "autoencoder":
        _bpe().save(str(folder / "bpe.json"))
    return folder


def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["red apple", "green apple", "red flag", "grey cat"] * 20, trainer)
    return tokenizer
