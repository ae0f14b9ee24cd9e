"""`cascade export --as diffusers`: the classes of diffusers open it, compute the same, and come back by the import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.configuration.diffusion import DiffusionTraining
from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import sample
from components.runtime.storage.store import Store
from components.sampling.cascade import compose
from components.sampling.images import to_bytes
from components.weights.exporting import write_classes
from components.weights.files import read_weights
from components.weights.importing import Target, import_weights
from tests.in_process import in_process
from tests.peer_unets import SMALL_DIT, SMALL_UNET, peer_autoencoder, randomized
from tests.refusals import assert_refused, one_line
from tests.tiny_cascade import TEXT, TOKENIZER
from tests.tiny_generators import LONE

UNET = {**SMALL_UNET, "norm_groups": 4}
CODES = {**TOKENIZER, "norm_groups": 4, "attention_resolutions": [8]}
OBJECTIVE = {"kind": "discrete", "schedule": "cosine", "num_train_timesteps": 50, "prediction_type": "v_prediction"}
DENOISER, LATENT = {"resolution": 8, "objective": OBJECTIVE}, {"resolution": 16}
DIT = {**SMALL_DIT, "num_classes": 5}
ADDED = {"num_classes": 5, "resample_in_blocks": False, "scale_shift_norm": False}
DDPM = {"norm_eps": 1e-2, "frequency_shift": 1, "sines_first": True, "pads_end": True}
BARE = {"projections": False, "latent_shift": 0.25, "decoder_attention_resolutions": []}
TEXTS = {"text_conditioning": "spatial_transformer", "text_states_dim": 6, "transformer_depth": 2, "head_dim": None}
TEXTS |= {"num_heads": 2, "resample_in_blocks": False}
WIDE = {"channel_mult": [1, 1.5], "num_res_blocks": 2, "attention_resolutions": [8, 4], "head_dim": None}
TWINS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unet": ("unet", UNET, DENOISER),
    "unet of classes": ("unet", {**UNET, **ADDED}, DENOISER),
    "unet of one head": ("unet", {**UNET, **WIDE, "num_heads": 1, "middle_attention": False}, DENOISER),
    "unet of a text": ("unet", {**UNET, **TEXTS}, DENOISER),
    "gaussian": ("autoencoder", {**CODES, "bottleneck": {"kind": "gaussian"}}, LATENT),
    "unet of DDPM": ("unet", {**UNET, **ADDED, **DDPM}, DENOISER),
    "gaussian of FLUX": ("autoencoder", {**CODES, **BARE, "bottleneck": {"kind": "gaussian"}}, LATENT),
    "codes": ("autoencoder", {**CODES, "bottleneck": {"kind": "vq", "codebook_size": 32, "codebook_dim": 4}}, LATENT),
    "codes of length 1": ("autoencoder", CODES, LATENT),
    "codes of maps": ("autoencoder", {**CODES, "image_channels": 7, "reconstruction": "classes"}, LATENT),
}
TIME, LABEL = torch.tensor([3, 40]), torch.tensor([1, 5])  # 5 is the null label
THEIRS = """
import json, sys
sys.modules["components"] = sys.modules["pipelines"] = sys.modules["image_cascade"] = None
from pathlib import Path
import diffusers, torch
from safetensors.torch import load_file, save_file
folder, found = Path(sys.argv[1]), {}
given = load_file(folder / "inputs.safetensors")
for place in sorted(folder.glob("made *")):
    below = place / "unet" if (place / "unet").is_dir() else place
    kind = getattr(diffusers, json.loads((below / "config.json").read_text())["_class_name"])
    model, name = kind.from_pretrained(below), place.name.removeprefix("made ")
    label = {"class_labels": given["label"]} if model.config.get("num_class_embeds") else {}
    if "cross_attention_dim" in model.config:
        states = given["text_states"]
        label = {"encoder_hidden_states": states, "encoder_attention_mask": (states != 0).any(-1)}
    arguments = (given["x 8"], given["time"]) if below != place else (given["x 16"],)
    if model.config.in_channels == 7:
        arguments = (given["planes"],)
    with torch.no_grad():
        found[name] = model(*arguments, **label).sample.contiguous()
pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "dit made", trust_remote_code=True)
found["dit"] = pipeline(noise=given["x 8"], label=given["label of dit"], guidance_scale=2.0)
save_file(found, folder / "found.safetensors")
"""


def written(folder: Path, name: str, **changes: Any) -> ModelBundle:
    """A model on disk with random weights."""
    kind, network, settings = TWINS[name]
    network = {**network, **changes}
    torch.manual_seed(0)
    bundle = ModelBundle(kind, network, settings, randomized(NETWORKS[kind](**network)))
    save_bundle(folder, bundle)
    return bundle


def exported(folder: Path, model: str = "model", out: str = "made") -> Path:
    done = in_process("export", model, "--as", "diffusers", "--out", out, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ModelBundle]]:
    """Every twin, exported."""
    folder = tmp_path_factory.mktemp("twins")
    bundles = {name: written(folder / name, name) for name in TWINS}
    for name in TWINS:
        exported(folder, name, f"made {name}")
    module = randomized(NETWORKS["dit"](**DIT))
    bundles["dit"] = ModelBundle("dit", DIT, DENOISER, module)
    save_bundle(folder / "dit", bundles["dit"])
    done = in_process("export", "dit", "--as", "diffusers", "--out", "dit made", cwd=folder)
    assert "without a twin (no class of diffusers is a twin of a network dit" in done.stdout
    return folder, bundles


@torch.no_grad()
def sampled(bundle: ModelBundle, noise: Tensor, label: Tensor) -> Tensor:
    """Our images of the noise, with guidance of 2."""
    objective = make_objective(bundle.settings["objective"])
    network = guide(objective, bundle.module, {"label": label}, {"label": torch.full_like(label, 5)}, 2.0)
    return sample(network, objective, noise, noise=lambda _: noise, sampler="ddim", num_inference_steps=50)


@torch.no_grad()
def test_classes_of_diffusers_compute_the_same_where_nothing_of_ours_can_be_imported(made):
    folder, bundles = made
    generator = torch.Generator().manual_seed(1)
    inputs = {f"x {side}": torch.randn(2, 3, side, side, generator=generator) for side in (8, 16)}
    inputs["text_states"] = torch.randn(2, 7, 6, generator=generator)
    inputs["text_states"][0, 5:] = 0  # padding
    classes = torch.randint(7, (2, 1, 16, 16), generator=generator)
    inputs["map"] = (255 * classes / 6).round().expand(2, 3, 16, 16) / 127.5 - 1
    inputs["planes"] = bundles["codes of maps"].module.planes(inputs["map"]).contiguous()
    labels = {"label": LABEL, "label of dit": torch.tensor([0, 3])}
    save_file({**inputs, "time": TIME, **labels}, folder / "inputs.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", THEIRS, str(folder)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(folder / "hub")}
    )
    assert done.returncode == 0, done.stderr
    found = load_file(folder / "found.safetensors")
    assert found.keys() == bundles.keys()
    made_here = sampled(bundles["dit"], inputs["x 8"], labels["label of dit"])
    assert (to_bytes(found.pop("dit")).int() - to_bytes(made_here).int()).abs().max() <= 1
    assert to_bytes(made_here).float().std() > 20
    for name, (kind, _, _, module) in [(name, bundles[name]) for name in TWINS]:
        if kind == "autoencoder":
            wanted = module(inputs["map"])[0] if module.map_classes else module.reconstruct(inputs["x 16"])
        else:
            conditions = {"label": LABEL, "text_states": inputs["text_states"]}
            conditions = {name: value for name, value in conditions.items() if name in module.conditions}
            wanted = module(inputs["x 8"], TIME, **conditions)
        assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def taken(name: str, network: dict[str, Any]) -> Target | None:
    """The stage that takes a U-Net back; an autoencoder's config.json says everything."""
    if TWINS[name][0] == "autoencoder":
        return None
    about = {"total_steps": 100, "global_batch_size": 4, "learning_rate": 1e-4, "resolution": 8, "network": "unet"}
    about |= {"conditions": ("label",) if network.get("num_classes") else (), "cond_drop_prob": 0.1}
    if "text_states_dim" in network:
        about |= {"conditions": ("text_states",), "text_states_dim": 6, "text_conditioning": "spatial_transformer"}
    return Target("r/base", DiffusionTraining.of(**about, model_channels=8, channel_mult=(1,)))


@pytest.mark.parametrize("name", TWINS)
def test_what_was_exported_is_imported_with_the_same_tensors(tmp_path: Path, made, name: str):
    folder, bundles = made
    network, own = bundles[name].network, bundles[name].module.state_dict()
    weights = read_weights(str(next((folder / f"made {name}").rglob("config.json")).parent))
    back = import_weights(weights, taken(name, network), out=Store(str(tmp_path / "ours"))).bundle.module.state_dict()
    averages = {name for name in own if name.startswith("bottleneck.") and name != "bottleneck.codebook"}
    assert back.keys() == own.keys() - averages
    assert all(torch.equal(back[name], own[name]) for name in back)


def test_in_a_cascade_the_autoencoder_has_the_scale_of_the_latents(tmp_path: Path):
    written(tmp_path / "autoencoder", "gaussian")
    kind, network, settings = TWINS["unet"]
    latent = {**network, "in_channels": 8, "out_channels": 8}
    base = ModelBundle(kind, latent, settings | {"latent_scale": 0.5}, NETWORKS[kind](**latent))
    save_bundle(tmp_path / "base", base)
    compose(tmp_path / "model", base=tmp_path / "base", autoencoder=tmp_path / "autoencoder")
    config = json.loads((exported(tmp_path) / "autoencoder/config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 0.5)
    assert (tmp_path / "made/base/unet/config.json").is_file()


def test_an_autoencoder_keeps_the_scaling_factor_that_it_came_with(tmp_path: Path):
    peer_autoencoder(8, scaling_factor=0.5).save_pretrained(tmp_path / "theirs")
    assert in_process("import", "theirs", "--out", "model", cwd=tmp_path).returncode == 0
    assert AutoencoderKL.from_pretrained(exported(tmp_path)).config["scaling_factor"] == 0.5


def test_a_pipeline_of_diffusers_makes_the_images_that_we_make_of_the_same_noise(tmp_path: Path):
    bundle = written(tmp_path / "model", "unet")
    pipeline = DiffusionPipeline.from_pretrained(exported(tmp_path))
    assert type(pipeline).__name__ == "DDIMPipeline"
    pipeline.set_progress_bar_config(disable=True)
    about = {"num_inference_steps": 10, "use_clipped_model_output": True, "output_type": "np"}
    theirs = pipeline(batch_size=3, generator=torch.Generator().manual_seed(2), **about).images

    def noise(_step: int) -> Tensor:
        return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    how: Any = {"sampler": "ddim", "num_inference_steps": 10, "spacing": "trailing"}
    made = sample(bundle.module, make_objective(OBJECTIVE), noise(-1), noise=noise, **how)
    ours = to_bytes(made).numpy().astype(int)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert ours.std() > 20


GROUPS = {"norm_groups": None, "model_channels": 48, "channel_mult": [1, 2]}
LAPLACE = {"reconstruction": "logit_laplace"}


@pytest.mark.parametrize(
    ("kind", "network", "words"),
    [
        ("unet", GROUPS, "its group norms have 12"),
        ("unet", {"text": TEXT}, "it is conditioned on text: no class of diffusers computes that"),
        ("unet", {"channel_mult": [2, 2]}, "its first level has 2 model_channels"),
        ("unet", {"plus_plus": True}, "it is DDPM"),
        ("unet", {"head_dim": None, "num_heads": 2, "attention_resolutions": [8]}, "heads of attention"),
        ("unet of edm", {}, "its process is edm, without steps"),
        ("gan", LONE["gan"][1], "no class of diffusers is a twin of a network gan"),
        ("autoencoder", {"patch_shortcut": True}, "it has a patch_shortcut"),
        ("autoencoder", LAPLACE, "its decoder gives the parameters of logit_laplace"),
        ("autoencoder", {"bottleneck": {"kind": "fsq", "levels": [5, 5]}}, "its bottleneck is fsq"),
    ],
)
def test_a_trait_that_diffusers_lacks_is_refused_by_name(tmp_path: Path, kind: str, network: dict, words: str):
    kind, _, process = kind.partition(" of ")
    network = {"unet": UNET, "autoencoder": CODES, "gan": {}}[kind] | network
    about = (DENOISER if kind == "unet" else LATENT) | ({"objective": {"kind": process}} if process else {})
    bundle = ModelBundle(kind, network, about, NETWORKS[kind](**network))
    if kind == "unet":  # by the command it becomes a program with a pipeline of its own
        with one_line(ValueError, f"{words}.*--as pt2 or onnx"):
            write_classes(bundle, tmp_path)
    else:
        save_bundle(tmp_path / "model", bundle)
        done = in_process("export", "model", "--as", "diffusers", "--out", "made", cwd=tmp_path)
        assert_refused(done, words, "--as pt2 or onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * (kind != "unet")


def test_a_learned_variance_is_of_ddpm_and_a_network_of_classes_is_no_pipeline(tmp_path: Path, made):
    objective = OBJECTIVE | {"prediction_type": "epsilon", "variance": "learned_range", "loss": "hybrid"}
    network = {**UNET, "learned_variance": True}
    module = NETWORKS["unet"](**network)
    save_bundle(tmp_path / "model", ModelBundle("unet", network, DENOISER | {"objective": objective}, module))
    folder = exported(tmp_path)
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["variance_type"]) == ("DDPMScheduler", "learned_range")
    assert not (made[0] / "made unet of classes/model_index.json").exists()
