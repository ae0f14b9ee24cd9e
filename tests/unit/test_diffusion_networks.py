"""From the numbers of a recipe to its network, and from a bundle back to it; numbers of diffusion networks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.configuration.config import IDENTITY
from components.configuration.networks import ImageAttentionUNetConfig
from components.models.bundle import NETWORKS, ModelBundle, load_bundle, save_bundle
from components.models.unet import UNet
from components.sampling.model import load_model
from components.sampling.plan import Plan, check_conditions, encode_conditions
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.tasks.diffusion import DiffusionTask
from tests.tiny_text_image import classifier_config
from tests.tiny_training import DATASET_INFO, GRID, diffusion_config, dit_config, pixel_config, rows_at

CONFIGS = {
    "base": diffusion_config(),
    "fractional": diffusion_config(channel_mult=(0.5, 1), model_channels=16),
    "upsampler": diffusion_config(low_res_resolution=4),
    "ddpm": diffusion_config(scale_shift_norm=False, resample_in_blocks=False, head_dim=None, num_heads=1),
    "glide": diffusion_config(text_conditioning="cross_attention", text_padding="learned"),
    "ldm": diffusion_config(
        text_conditioning="spatial_transformer", class_token_dim=8, transformer_depth=2, in_channels=4
    ),
    "dalle2": diffusion_config(image_embedding_dim=6, text_states_dim=5, conditions=()),
    "dit": dit_config(conditions=("condition_image",), condition_member="depth"),
    "classifier": classifier_config(channel_mult=(0.5, 1)),
    **{network: pixel_config(network=network) for network in ("pixelcnn", "row_lstm")},
    **{f"{network} of tokens": pixel_config(network=network, resolution=None) for network in ("pixelcnn", "row_lstm")},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bundle_rebuilds_the_network_of_a_recipe(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    arguments = config.network_arguments(DATASET_INFO, GRID if config.needs().resolution is None else None)
    assert json.loads(json.dumps(arguments)) == arguments
    network = NETWORKS[config.network.kind](**arguments)
    save_bundle(tmp_path, ModelBundle(config.network.kind, arguments, {}, network))
    loaded = load_bundle(tmp_path).module
    assert type(loaded) is type(network)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))


def test_weights_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    """As those of a network that sees an image as tokens, of before rotary positions."""
    network = UNet(**CONFIGS["base"].network_arguments(DATASET_INFO))
    network.register_parameter("positions", torch.nn.Parameter(torch.zeros(2)))
    save_bundle(tmp_path, ModelBundle("unet", CONFIGS["base"].network_arguments(DATASET_INFO), {}, network))
    with pytest.raises(ValueError, match=r"weights of another version .*positions.*; train it again") as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)
    kept = ImageAttentionUNetConfig(model_channels=8, channel_mult=(1, 2))
    # Nor are its keys.
    assert kept.model_dump(context=IDENTITY) == kept.model_dump(exclude=kept.unchanged()) | {
        "positions": "rotary"
    }  # nor are its keys


def test_a_text_beside_patches_of_an_image_lies_nowhere_in_new_trainings_and_their_keys() -> None:
    sizes = {"model_channels": 8, "channel_mult": (1, 2), "attention_resolutions": (4,), "head_dim": 8}
    network = {"kind": "image_attention_unet", "image_token_dim": 8, **sizes}
    changes = {"network": network, "condition_member": "depth"}
    for conditions in (("condition_image",), ("condition_image", "text_states")):
        config = diffusion_config(conditions=conditions, **changes)
        assert ("other_tokens" in config.model_dump(context=IDENTITY)) == ("text_states" in conditions)
        assert config.network_arguments(DATASET_INFO).get("others_nowhere", False) == ("text_states" in conditions)
    assert "other_tokens" not in diffusion_config(conditions=("text_states",)).model_dump(context=IDENTITY)


@pytest.mark.parametrize(
    ("changes", "argument", "value"),
    [
        ({"variance": "learned_range", "loss": "hybrid"}, "learned_variance", True),
        ({"cond_drop_prob": 0.0}, "null_label", False),
        ({"low_res_resolution": 4, "max_noise_level": 0}, "embed_noise_level", False),
        ({"conditions": ("condition_image",), "condition_member": "mask"}, "condition_image_channels", 3),
        ({"channel_mult": (1, 2)}, "channel_mult", [1, 2]),
    ],
)
def test_numbers_of_training_decide_what_the_network_needs(changes: dict[str, Any], argument: str, value: Any) -> None:
    assert diffusion_config(**changes).network_arguments(DATASET_INFO)[argument] == value
    with pytest.raises(ValueError, match="class_token_dim needs label"):
        diffusion_config(conditions=("text",), class_token_dim=8)


def test_a_label_that_is_never_dropped_has_no_null_and_needs_none(tmp_path: Path) -> None:
    """ADM's table of labels: previews are not guided, a request must name its class."""
    config = diffusion_config(cond_drop_prob=0.0, conditions=("label",))
    task = DiffusionTask(config, dataset_info=DATASET_INFO)
    task.train_step(to_batch(rows_at(config, range(8))), 1)
    assert task.preview(rows_at(config, range(8)), 1)
    network = task.learner.network
    assert network.class_embedding.num_embeddings == DATASET_INFO.num_classes
    save_bundle(tmp_path, ModelBundle("unet", config.network_arguments(DATASET_INFO), {}, network))
    model = load_model("base", tmp_path)
    check_conditions(model, Request(label=0, seed=1))
    assert encode_conditions(model, [Plan(label=0, seed=1)]).null == {}
    with pytest.raises(ValueError, match="needs a label"):
        check_conditions(model, Request(seed=1))
