"""What the bundle of a diffusion model says: arguments of its network, its objective, and how it is sampled."""

from typing import Any

from components.training.classifier_config import ClassifierConfig
from components.training.config import DatasetInfo, DiffusionConfig
from components.training.image_to_image_config import ImageToImageConfig


def network_kind(config: DiffusionConfig) -> str:
    """The kind of its bundle."""
    return {"unet": "diffusion", "dit": "dit"}[config.backbone]


def network_arguments(config: DiffusionConfig, dataset_info: DatasetInfo) -> dict[str, Any]:
    """Arguments of the network for this recipe and data set; plain values, they go into the bundle."""
    own = dit_arguments(config) if config.backbone == "dit" else unet_arguments(config)
    return own | {"resolution": config.resolution} | condition_arguments(config, dataset_info)


def unet_arguments(config: DiffusionConfig) -> dict[str, Any]:
    """Layers of a U-Net. A recipe without labels has no class tokens either."""
    return {
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_resolutions),
        "head_dim": config.head_dim,
        "num_heads": config.num_heads,
        "dropout": config.dropout,
        "text_conditioning": config.text_conditioning,
        "transformer_depth": config.transformer_depth,
        "class_token_dim": config.class_token_dim if "label" in config.conditions else None,
        "scale_shift_norm": config.scale_shift_norm,
        "resample_in_blocks": config.resample_in_blocks,
        "norm_groups": config.norm_groups,
        "gradient_checkpointing": config.gradient_checkpointing,
        "middle_attention": config.crop_size is None,
    }


def dit_arguments(config: DiffusionConfig) -> dict[str, Any]:
    """Layers of a diffusion transformer, whose heads may be given by their channels too."""
    return {
        "patch_size": config.patch_size,
        "model_dim": config.model_channels,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads or config.model_channels // (config.head_dim or config.model_channels),
        "gradient_checkpointing": config.gradient_checkpointing,
    }


def condition_arguments(config: DiffusionConfig, dataset_info: DatasetInfo) -> dict[str, Any]:
    """What both backbones take. A label that is never dropped needs no null label, and noise that is never added no
    embedding of its level."""
    text = {
        "vocab_size": dataset_info.vocab_size,
        "context_length": dataset_info.text_length,
        "model_dim": config.text_dim,
        "num_layers": config.text_layers,
        "num_heads": config.text_heads,
        "learned_padding": config.text_padding == "learned",
    }
    sizes = {"text_states": dataset_info.text_states_dim, "image_embedding": dataset_info.image_embedding_dim}
    made = {name: size for name, size in sizes.items() if name in config.conditions}  # by frozen encoders
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "learned_variance": config.variance == "learned_range",
        "num_classes": dataset_info.num_classes if "label" in config.conditions else None,
        "null_label": config.cond_drop_prob > 0,
        "text": text if "text" in config.conditions else None,
        "text_states_dim": config.text_states_dim or made.get("text_states"),
        "image_embedding_dim": config.image_embedding_dim or made.get("image_embedding"),
        "condition_image_channels": config.condition_image_channels,
        "low_res": config.low_res_resolution is not None,
        "embed_noise_level": config.max_noise_level > 0,
    }


def process_settings(config: DiffusionConfig | ClassifierConfig) -> dict[str, Any]:
    """How images are noised, as `make_objective` takes it; plain values."""
    if config.objective == "edm":
        return {"name": "edm", "sigma_data": config.sigma_data}
    if config.objective == "flow":
        return {"name": "flow", "time_density": config.time_density}
    numbers = {"schedule", "beta_start", "beta_end", "num_train_timesteps", "zero_terminal_snr"}
    return {"name": "discrete", **config.model_dump(include=numbers)}


def objective_settings(config: DiffusionConfig) -> dict[str, Any]:
    """What `make_objective` builds this recipe's objective from; plain values, they go into the bundle."""
    learned = {"prediction_type", "variance", "loss", "min_snr_gamma"}
    return process_settings(config) | (config.model_dump(include=learned) if config.objective == "discrete" else {})


def low_res_schedule_settings(config: DiffusionConfig) -> dict[str, Any]:
    """Arguments of the schedule that an upsampler's noise levels count in; plain values, they go into the bundle."""
    return {
        "name": config.schedule,
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
    }


def sampling_settings(config: DiffusionConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What sampling needs to know."""
    base = {
        "role": "base" if config.low_res_resolution is None else "upsampler",
        "resolution": config.resolution,
        "objective": objective_settings(config),
        "sampler": config.sampler,
        "num_inference_steps": config.num_inference_steps,
        "eta": config.eta,
        "spacing": config.spacing,
        "threshold": config.threshold,
        "threshold_percentile": config.threshold_percentile,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": config.guidance_interval and list(config.guidance_interval),
        "guidance_rescale": config.guidance_rescale,
        "classes": list(classes),
    }
    if isinstance(config, ImageToImageConfig):
        learned = {"tasks": list(config.tasks), "factors": list(config.super_resolution_factors)}
        return base | {"role": "image_to_image", "mask_area": list(config.mask_area)} | learned
    if config.condition_member is not None:
        base |= {"condition_member": config.condition_member}
    if config.low_res_resolution is None:
        return base
    return base | {
        "low_res_resolution": config.low_res_resolution,
        "low_res_schedule": low_res_schedule_settings(config),
        "noise_level": config.noise_level,
    }
