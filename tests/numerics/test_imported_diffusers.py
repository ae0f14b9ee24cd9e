"""Models of diffusers, saved by their own code with random weights, compute the same after import."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PriorTransformer, UNet2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from components.configuration.diffusion import DiffusionTraining, DiscreteProcess
from components.models.bundle import ModelBundle
from components.runtime.storage.store import Store
from components.weights.files import read_weights
from components.weights.importing import Target, import_weights
from tests.peer_unets import peer_autoencoder, peer_unet, randomized

TIME = torch.tensor([0, 3, 700])
LABEL = torch.tensor([1, 0, 4])
EPSILON = DiscreteProcess(prediction_type="epsilon", min_snr_gamma=None)
ATTEND = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
ATTEND |= {"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}


def training(labels: bool, *, network: str = "unet", **changes: object) -> DiffusionTraining:
    """A stage of other sizes than the file's: only its process and its conditions count."""
    sizes = {"unet": {"model_channels": 8, "channel_mult": (1,)}, "dit": {"model_dim": 8, "num_heads": 1}}[network]
    about = {"total_steps": 100, "global_batch_size": 4, "learning_rate": 1e-4, "resolution": 8, "network": network}
    conditions = {"conditions": ("label",) if labels else (), "cond_drop_prob": 0.0}
    return DiffusionTraining.of(**{"process": EPSILON, **conditions, **sizes, **about, **changes})


def imported(peer: nn.Module, folder: Path, target: DiffusionTraining | None = None, **about: bool) -> ModelBundle:
    """The peer's own files as a model of ours."""
    peer.save_pretrained(folder / "theirs")
    named = None if target is None else Target("recipe/base", target, **about)
    return import_weights(read_weights(str(folder / "theirs")), named, out=Store(str(folder / "ours"))).bundle


def images(channels: int, side: int) -> Tensor:
    return torch.randn(len(TIME), channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("resample_in_blocks", [False, True])
@torch.no_grad()
def test_a_unet_computes_what_diffusers_computes(tmp_path: Path, labels: bool, resample_in_blocks: bool):
    about = {"resample_in_blocks": resample_in_blocks, "num_class_embeds": 5 if labels else None}
    about |= {"norm_num_groups": 4, "attn_norm_num_groups": 4}  # else its middle has no norm before attention
    peer = randomized(peer_unet(16, 16, (1, 2), 2, (8,), 8, **about))
    bundle, x = imported(peer, tmp_path, training(labels)), images(3, 16)
    conditions = {"class_labels": LABEL} if labels else {}
    found = bundle.module(x, TIME, label=LABEL if labels else None)
    torch.testing.assert_close(found, peer(x, TIME, **conditions).sample, rtol=1e-5, atol=1e-5)
    assert bundle.network["num_classes"] == (5 if labels else None)
    assert bundle.settings["resolution"] == 16


DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-2}


@pytest.mark.parametrize("changes", [{}, DDPM, *({name: value} for name, value in DDPM.items())])
@torch.no_grad()
def test_a_unet_of_ddpm_s_norms_times_and_padding_computes_what_diffusers_computes(tmp_path: Path, changes: dict):
    """As `google/ddpm-*`, whose eps of 1e-6 would not show; a config.json of that age says no more than this one."""
    about = {"resample_in_blocks": False, "norm_num_groups": 4, "resnet_time_scale_shift": "default"}
    peer = randomized(peer_unet(16, 16, (1, 1, 2), 1, (8,), None, **about, **changes))
    peer.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    written = json.loads(config.read_text())
    younger = ("attn_norm_num_groups", "add_attention", "resnet_time_scale_shift", "dropout", "downsample_type")
    config.write_text(json.dumps({name: value for name, value in written.items() if name not in younger}))
    target = Target("recipe/base", training(False))
    bundle = import_weights(read_weights(str(tmp_path / "theirs")), target, out=Store(str(tmp_path / "ours"))).bundle
    x = images(3, 16)
    torch.testing.assert_close(bundle.module(x, TIME), peer(x, TIME).sample, rtol=1e-5, atol=1e-5)
    younger_of_ours = {"norm_eps", "frequency_shift", "sines_first", "pads_end"} & bundle.network.keys()
    assert len(younger_of_ours) == len(changes)  # at its default none is written


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 1, "out_channels": 1},
        {"in_channels": 182, "out_channels": 182},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        *({side: blocks} for side, blocks in ATTEND.items()),
        {"num_vq_embeddings": 12, **ATTEND},
        {"num_vq_embeddings": 12, "vq_embed_dim": 5, **ATTEND},
    ],
)
@torch.no_grad()
def test_an_autoencoder_computes_what_diffusers_computes(tmp_path: Path, changes: dict[str, Any]):
    """Its config.json says everything: no recipe is named."""
    peer = peer_autoencoder(16, 32, layers_per_block=2, **changes)
    x = images(changes.get("in_channels", 3), 16)
    found = imported(peer, tmp_path).module.reconstruct(x)
    torch.testing.assert_close(found, peer(x).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_latents_of_stable_diffusion_3_and_flux_are_shifted(tmp_path: Path):
    """No convolutions around the bottleneck, 16 channels; the scale is left to the model on the latents."""
    about = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.25, "scaling_factor": 0.3611}
    peer = peer_autoencoder(16, 32, latent_channels=16, **about)
    ours, x = imported(peer, tmp_path).module, images(3, 16)
    latents = peer.encode(x).latent_dist.mode() - 0.25
    torch.testing.assert_close(ours.to_latents(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.from_latents(latents), peer.decode(latents + 0.25).sample, rtol=1e-5, atol=1e-5)
    assert ours.diffused_shape == (16, 8, 8)


KARLO = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "embedding_dim": 6, "num_embeddings": 5}


@torch.no_grad()
def test_a_prior_of_karlo_computes_what_diffusers_computes(tmp_path: Path):
    """Its config.json says everything; pads of a text are hidden by the mask there, as states of zeros here."""
    peer = randomized(PriorTransformer(**KARLO))
    bundle = imported(peer, tmp_path)
    generator = torch.Generator().manual_seed(2)
    x_t, text, states = (torch.randn(3, *shape, generator=generator) for shape in ((6,), (6,), (5, 6)))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] + [False] * 4])
    states = states * mask[..., None]
    wanted = peer(x_t, TIME, text, states, mask).predicted_image_embedding
    found = bundle.module(x_t, TIME, text_states=states, text_embedding=text)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert bundle.settings["objective"]["prediction_type"] == "sample"


def test_a_prior_of_other_traits_is_refused_by_name(tmp_path: Path):
    peer = PriorTransformer(**KARLO, embedding_proj_norm_type="layer")
    with pytest.raises(ValueError, match="embedding_proj_norm_type 'layer': our network knows None alone"):
        imported(peer, tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"use_quant_conv": False}, "use_post_quant_conv True: our network knows False alone"),
        ({"out_channels": 6}, "out_channels 6: our network knows 3 alone"),
        (
            {"up_block_types": ["UpDecoderBlock2D"]},
            "block_out_channels, down_block_types, up_block_types of 2, 2, 1 levels",
        ),
    ],
)
def test_a_switch_that_our_autoencoder_lacks_is_refused_by_name(tmp_path: Path, changes: dict, fault: str):
    peer = peer_autoencoder(8, 8)
    peer.register_to_config(**changes)
    with pytest.raises(ValueError, match=fault):
        imported(peer, tmp_path)


def dit(**changes: object) -> DiTTransformer2DModel:
    """A tiny DiT with the frequencies of the code that published weights were trained by.
    Diffusers computes others (`downscale_freq_shift` 1 in its embedding), and its norms' eps is ten times larger."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    peer = randomized(DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=5, norm_eps=1e-6, **changes))
    first = peer.transformer_blocks[0].norm1.emb
    for block in peer.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return peer


def dit_training() -> DiffusionTraining:
    process = EPSILON.replace(variance="learned_range", loss="hybrid")
    return training(True, network="dit", process=process, cond_drop_prob=0.1)


@torch.no_grad()
def test_a_dit_computes_what_diffusers_computes(tmp_path: Path):
    peer, x = dit(), images(4, 8)
    bundle = imported(peer, tmp_path, dit_training(), of_latents=True)
    found = bundle.module(x, TIME, label=LABEL)
    torch.testing.assert_close(found, peer(x, TIME, class_labels=LABEL).sample, rtol=1e-5, atol=1e-5)
    assert (bundle.network["num_classes"], bundle.settings["latent_scale"]) == (5, 0.18215)


def test_a_dit_of_other_embeddings_in_each_block_is_refused(tmp_path: Path):
    peer = dit()
    nn.init.ones_(peer.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    with pytest.raises(ValueError, match=r"each block has a time_mlp\.0\.bias of its own"):
        imported(peer, tmp_path, dit_training())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor 2: our network knows 1 alone"),
        ({"center_input_sample": True}, "center_input_sample True"),
        ({"downsample_padding": 2}, "downsample_padding 2"),
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"upsample_type": "resnet"}, "resamples in two ways"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "has blocks SkipDownBlock2D"),
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel, of no family known here"),
    ],
)
def test_a_switch_that_our_unet_lacks_is_refused_by_name(tmp_path: Path, changes: dict[str, object], fault: str):
    """The names and the shapes would fit, the function would be another."""
    peer: UNet2DModel = peer_unet(8, 8, (1, 1), 1, (4,), 4, resample_in_blocks=False, norm_num_groups=4)
    peer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=fault):
        import_weights(
            read_weights(str(tmp_path)), Target("r/base", training(False)), out=Store(str(tmp_path / "ours"))
        )
    assert not (tmp_path / "ours").exists()
