"""A whole Stable Diffusion of diffusers' classes: imported, fine-tuned, sampled as it is served, and exported again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining, DiscreteProcess
from components.configuration.optimization import StartConfig
from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.models.diffusion.corruption import upsample
from components.models.diffusion.objective import make_objective
from components.sampling.cascade import Cascade, compose
from components.sampling.frozen_text import FrozenTextError, load_frozen_text
from components.sampling.generators.diffusion import image_noise
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.frozen import Latents, caption_encoder
from components.training.loop import fit
from components.weights.exporting import scheduler_config
from components.weights.families import autoencoders, unets
from components.weights.files import fetch_encoder
from components.weights.importing import on_meta
from components.weights.stable_diffusion import DEFAULTS, SCHEDULES, gives_noise_back, process_of, unet_config
from components.weights.starts import start_loader
from tests.foreign_weights import adm_layers, first_stage_layers, tensors_of, words_of
from tests.in_process import in_process
from tests.peer_unets import peer_autoencoder, randomized
from tests.refusals import assert_refused
from tests.tiny_cascade import artifact_in
from tests.tiny_text_image import tiny_bpe
from tests.tiny_training import SHARED, batches, make_task
from tests.unit.test_frozen_text import pipeline as clip_of

SCALE, STEPS, PROMPT = 0.5, 50, "a b c"
BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16)}
BLOCKS |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4}
NOISE = {"num_train_timesteps": 100, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02}
PROCESS = {"num_train_timesteps": 100, "schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02}
PROCESS |= {"prediction_type": "epsilon", "min_snr_gamma": None}


def t5_of(folder: Path, **about: Any) -> tuple[T5EncoderModel, T5Tokenizer]:
    """The encoder of T5 v1.1 of 8 features alone, and a tokenizer of five letters."""
    tokenizer = T5Tokenizer(vocab=[(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁", *"abcde")], extra_ids=0)
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 2, "vocab_size": len(tokenizer)}
    return randomized(T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))), tokenizer


V_PREDICTION = NOISE | {"prediction_type": "v_prediction"}
TOWERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # tower, its, U-Net's, scheduler's
    "clip": (clip_of, {}, {"attention_head_dim": 2}, NOISE | {"steps_offset": 1}),
    "t5": (t5_of, {}, {"attention_head_dim": 2}, NOISE | {"steps_offset": 1}),
    "of version 2": (
        clip_of,
        {"hidden_act": "gelu", "projection_dim": 4, "pad_token_id": 3},
        {"attention_head_dim": [1, 2], "use_linear_projection": True, "upcast_attention": True},
        V_PREDICTION | {"steps_offset": 1},
    ),
    "without signal": (
        clip_of,
        {"hidden_act": "gelu"},
        {"attention_head_dim": [1, 2], "use_linear_projection": True},
        V_PREDICTION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 1},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By text tower `theirs`, a Stable Diffusion as diffusers saves it with random weights, and its import, `ours`."""
    return {name: imported(tmp_path_factory.mktemp("pipeline"), *about) for name, about in TOWERS.items()}


def saved(place: Path, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, noise: dict[str, Any]) -> None:
    """A whole Stable Diffusion as diffusers writes it."""
    models = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    scheduler = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**models, scheduler=scheduler, **nothing).save_pretrained(place)


def imported(place: Path, tower: Any, text: dict, unet: dict, noise: dict) -> Path:
    network, tokenizer = tower(place / "tower", **text)
    tokenizer.model_max_length = 7
    sizes = BLOCKS | {"sample_size": 8, "cross_attention_dim": 8} | unet
    vae = peer_autoencoder(8, 8, scaling_factor=SCALE)
    saved(place / "theirs", vae, network, tokenizer, randomized(UNet2DConditionModel(**sizes)), noise)
    (place / "theirs/README.md").write_text("---\nlicense: openrail\n---\n")
    done = in_process("import", "theirs", "--out", "ours", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "base, autoencoder and text_encoder" in done.stdout
    return place


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["clip"]


def opened(folder: Path) -> Cascade:
    with artifact_in(folder).local_copy() as copy:
        return Cascade.load(copy)


def assert_same_image(cascade: Cascade, pipeline: Any, steps: int = STEPS) -> None:
    """One gray level at most between the image of a request and the pipeline's of the same noise."""
    request = Request(prompt=PROMPT, seed=3, sampling={"base": {"num_inference_steps": steps}})
    latents = image_noise(cascade.base, [cascade.resolve(request)])(-1)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, latents=latents, num_inference_steps=steps, output_type="np").images[0]
    (ours,) = cascade.sample([request])
    assert ours.std() > 20
    assert np.abs(ours.astype(int) - np.round(theirs * 255)).max() <= 1


def test_a_training_reads_the_text_encoder_of_what_was_imported(folder: Path, tmp_path: Path):
    """The cascade's own folder says where its parts lie."""
    artifact = artifact_in(folder / "ours")
    fetched = fetch_encoder(str(folder / "ours/text_encoder"), tmp_path / "fetched")
    files = {path.name: path.read_bytes() for path in fetched.iterdir()}
    assert files.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert files == {name: artifact.read(f"text_encoder/{name}") for name in files}
    with pytest.raises(FrozenTextError, match=r"ours/vae holds no text encoder, it lacks config\.json"):
        fetch_encoder(str(folder / "ours/vae"), tmp_path / "none")


@pytest.mark.parametrize("tower", TOWERS)
def test_what_was_imported_makes_the_pipeline_s_image_of_the_same_noise(folders: dict[str, Path], tower: str):
    """Of one step, too: a whole image hides small differences of attention."""
    place = folders[tower]
    cascade, pipeline = opened(place / "ours"), DiffusionPipeline.from_pretrained(place / "theirs")
    generator, time = torch.Generator().manual_seed(0), torch.tensor([7])
    x_t, states = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (7, 8)))
    with torch.no_grad():
        wanted = pipeline.unet(x_t, time, states).sample
        torch.testing.assert_close(cascade.base.module(x_t, time, text_states=states), wanted, rtol=1e-5, atol=1e-5)
    assert_same_image(cascade, pipeline)


OPENCLIP = {  # names of transformers -> OpenCLIP's
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openclip_names(tower: dict[str, Tensor], *, depth: int) -> dict[str, Tensor]:
    """OpenCLIP's tensors of a text tower, with one more layer, which Stable Diffusion 2 leaves out."""
    found: dict[str, Tensor] = {}
    for name, tensor in tower.items():
        for theirs, ours in OPENCLIP.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    last = {name: each for name, each in found.items() if f".{depth - 2}." in name}
    found |= {
        name.replace(f".{depth - 2}.", f".{depth - 1}."): 9 * torch.ones_like(each) for name, each in last.items()
    }
    width = len(tower["final_layer_norm.bias"])
    return found | {"text_projection": torch.zeros(width, width), "logit_scale": torch.tensor(1.0)}


def single_file(folder: Path, version: int) -> tuple[dict[str, Tensor], str]:
    """Tensors of a Stable Diffusion of CompVis's names and shapes, and its tokenizer's file.
    `config`, beside them, is what diffusers' own code reads such a file by."""
    depth, width = 24, 64  # diffusers leaves out layer 23 of version 2 by its name
    version_2 = {"hidden_act": "gelu", "projection_dim": width, "num_hidden_layers": depth - 1}
    text = {"hidden_size": width, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
    tower, tokenizer = clip_of(folder / "clip", **text | (version_2 if version == 2 else {}))
    if version == 2:
        for name, word, own in (("vocab.json", "e</w>", "!"), ("tokenizer_config.json", "<|endoftext|>", "!")):
            path = folder / "clip/tokenizer" / name
            path.write_text(path.read_text().replace(f'"{word}"', f'"{own}"'))
        tokenizer = CLIPTokenizer.from_pretrained(folder / "clip/tokenizer")
    tokenizer.model_max_length = 16
    side = {1: 64, 2: 96}[version]
    sizes: dict[str, Any] = {"cross_attention_dim": width, "block_out_channels": (64, 128), "norm_num_groups": 32}
    sizes |= {1: {"attention_head_dim": 8}, 2: {"attention_head_dim": [1, 2], "use_linear_projection": True}}[version]
    turned = {"down_block_types": BLOCKS["down_block_types"][::-1], "up_block_types": BLOCKS["up_block_types"][::-1]}
    turned = turned if version == 2 else {}  # attention at the second level alone: fewer places
    vae = peer_autoencoder(32, 32, norm_num_groups=32, sample_size=2 * side, scaling_factor=0.18215)
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    noise |= {"prediction_type": {1: "epsilon", 2: "v_prediction"}[version]}
    unet = UNet2DConditionModel(sample_size=side, **BLOCKS | sizes | turned)
    saved(folder / "config", vae, tower, tokenizer, unet, noise)
    layers = adm_layers(64, (1, 2), 1, (version,), 4, 4, resample_in_blocks=False, scale_shift=False, context=width)
    parts = {"model.diffusion_model": tensors_of(layers, device="cpu")}
    parts["first_stage_model"] = tensors_of(first_stage_layers(32, (1, 1), 1, (), 4, (8, 4)), device="cpu")
    if version == 1:
        parts["cond_stage_model.transformer.text_model"] = dict(tower.state_dict())
    else:  # projections around a transformer are matrices
        own = parts["model.diffusion_model"]
        own |= {name: own[name][:, :, 0, 0] for name in own if re.search(r"\.proj_(in|out)\.weight", name)}
        parts["cond_stage_model.model"] = openclip_names(dict(tower.state_dict()), depth=depth)
    tokenizer.backend_tokenizer.save(words := str(folder / "tokenizer.json"))
    tensors = {f"{part}.{name}": each.contiguous() for part, own in parts.items() for name, each in own.items()}
    return tensors, words


@pytest.mark.parametrize("version", [1, 2])
def test_a_single_file_makes_the_image_that_diffusers_makes_of_it(tmp_path: Path, version: int):
    """Names and shapes of CompVis, read by diffusers' own code and by ours."""
    tensors, words = single_file(tmp_path, version)
    file = tmp_path / "sd.safetensors"
    save_file(tensors, file)
    assert_refused(
        in_process("import", "sd.safetensors", "--out", "ours", cwd=tmp_path), "give CLIP's, --tokenizer FILE"
    )
    words_of("a", "b").bpe.save(str(tmp_path / "others.json"))
    given = ("import", "sd.safetensors", "--out", "ours", "--tokenizer")
    assert_refused(
        in_process(*given, "others.json", cwd=tmp_path), "is not the tokenizer of this text encoder of 12 words"
    )
    for lost in ("out.0.bias", "out.2.weight"):
        save_file(without(tensors, f"model.diffusion_model.{lost}"), file)
        assert_refused(in_process(*given, words, cwd=tmp_path), f"of Stable Diffusion {version}", "missing")
    assert not (tmp_path / "ours").exists()
    save_file(tensors, file)
    done = in_process(*given, words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipeline = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "config"), safety_checker=None)
    assert_same_image(opened(tmp_path / "ours"), pipeline, steps=4)


def test_of_version_2_a_network_that_gives_noise_back_predicts_noise():
    """No other trait of the file tells the published 512² from 768²."""

    def bundle(gives: float) -> ModelBundle:
        def network(x_t: Tensor, time: Tensor, *, text_states: Tensor) -> Tensor:
            assert (time.tolist(), text_states.shape[2]) == ([999], 7)
            return gives * x_t + torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1)) / 2

        return ModelBundle("unet", {"in_channels": 4, "text_states_dim": 7}, {}, cast(Any, network))

    assert [gives_noise_back(bundle(gives)) for gives in (0.99, 0.07, -0.5)] == [True, False, False]


def test_sizes_told_by_shapes_alone_are_those_of_version_1():
    """Parameters of U-Net and first stage are those of the published files."""
    layers = adm_layers(320, (1, 2, 4, 4), 2, (1, 2, 4), 4, 4, resample_in_blocks=False, scale_shift=False, context=768)
    unet = unet_config(tensors_of(layers), 1, 64)
    vae = autoencoders.first_stage_sizes(tensors_of(first_stage_layers(128, (1, 2, 4, 4), 2, (), 4, (8, 4))), 64)
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert (unet["block_out_channels"], vae["resolution"]) == ([320, 640, 1280, 1280], 512)
    networks = {"unet": unets.sizes_by_text(unet), "autoencoder": vae}
    counts = {kind: sum(each.numel() for each in on_meta(kind, sizes).values()) for kind, sizes in networks.items()}
    assert counts == {"unet": 859_520_964, "autoencoder": 83_653_863}


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {each: tensor for each, tensor in tensors.items() if each != name}


def fine_tuned(folder: Path, parts: Path, changes: dict[str, object]) -> Path:
    """The cascade `tuned`, of a base that was trained for ten steps from the imported one."""
    sizes = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
    sizes |= {"head_dim": None, "num_heads": 2, "norm_groups": 4}
    sizes |= {"scale_shift_norm": False, "resample_in_blocks": False}
    sizes |= {"text_conditioning": "spatial_transformer", "in_channels": 4, "resolution": 8, "network": "unet"}
    about = SHARED | {"total_steps": 10, "init_from": StartConfig(uri=str(folder / "ours/base"))}
    sizes |= PROCESS | changes
    config = DiffusionTraining.of(**about, **sizes, conditions=("text_states",), cond_drop_prob=0.2)
    info = DatasetInfo(num_classes=1, text_states_dim=8, text_states_length=7)
    text, first_stage = load_frozen_text(parts / "text_encoder"), load_bundle(parts / "autoencoder").module
    latents: Any = Latents(first_stage, SCALE)
    encoders = (
        lambda _device: lambda batch: latents({"image": upsample(batch["image"], 16)}),
        lambda _device: caption_encoder(text, tiny_bpe()),
    )
    load = start_loader(config, info, None, bpe=None)
    task = make_task(config, dataset_info=info, load_start=load, load_encoders=encoders)
    before = load_bundle(parts / "base")
    fit(task, batches(config, to_batch), config.optimization)
    trained = task.learner.ema.network.state_dict()
    assert trained.keys() == before.module.state_dict().keys()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in before.module.state_dict().items())
    before.module.load_state_dict(trained)
    save_bundle(folder / "base", ModelBundle(*before[:3], before.module))
    own = {name: parts / name for name in ("autoencoder", "text_encoder")}
    sampling = {"base": {"spacing": "trailing", "threshold": "none", "guidance_scale": 7.5}}
    return compose(folder / "tuned", base=folder / "base", sampling=sampling, **own)


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("clip", {}),
        ("t5", {}),
        ("of version 2", {"head_dim": 8, "num_heads": None, "prediction_type": "v_prediction"}),
    ],
)
def test_a_fine_tuned_base_is_exported_as_a_pipeline_that_makes_the_image_that_is_served(
    folders: dict[str, Path], tower: str, changes: dict[str, object]
):
    folder = folders[tower]
    with artifact_in(folder / "ours").local_copy() as parts:
        tuned = fine_tuned(folder, parts, changes)
    done = in_process("export", "tuned", "--as", "diffusers", "--out", "made", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a whole StableDiffusionPipeline" in done.stdout
    names = {path.name for path in (folder / "made").iterdir()} - {"README.md"}
    assert names == {"model_index.json", "unet", "vae", "scheduler", "text_encoder", "tokenizer"}
    listed = dict(re.findall(r"^(\w+): (.*\..*)$", done.stdout, re.MULTILINE))
    there = {name: {path.name for path in (folder / "made" / name).iterdir()} for name in names if "." not in name}
    assert {name: set(listed[name].split(", ")) for name in listed} == there
    pipeline = DiffusionPipeline.from_pretrained(folder / "made")
    assert type(pipeline) is StableDiffusionPipeline
    assert_same_image(Cascade.load(tuned), pipeline)
    assert in_process("import", "made", "--out", "again", cwd=folder).returncode == 0
    assert_same_image(opened(folder / "again"), pipeline)


@pytest.mark.parametrize("changes", [{}, {"zero_terminal_snr": True}, {"num_train_timesteps": 50}])
@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_the_schedule_of_an_exported_scheduler_is_the_same_again(schedule: Any, changes: dict[str, Any]):
    process = DiscreteProcess.of(schedule=schedule, min_snr_gamma=None, **changes).objective()
    settings = {"objective": process, "latent_scale": SCALE}
    written = json.loads(json.dumps(scheduler_config(ModelBundle("unet", {}, settings, torch.nn.Identity()))))
    again: Any = make_objective(process_of(DEFAULTS | written))
    assert again.schedule.betas.tolist() == written["trained_betas"]
    with pytest.raises(ValueError, match="trained_betas that are not of its beta_schedule"):
        process_of(DEFAULTS | written | {"num_train_timesteps": 60})


def changed(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder / "theirs", place / "theirs"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [("unet/config.json", {"norm_eps": 1e-3}), ("vae/config.json", {"norm_num_groups": 2, "scaling_factor": 0.5})],
)
def test_a_pipeline_of_another_config_is_another_model_of_the_same_license(
    folder: Path, tmp_path: Path, file: str, changes: dict
):
    changed(copied(folder, tmp_path) / file, changes)
    assert in_process("import", "theirs", "--out", "ours", cwd=tmp_path).returncode == 0
    before, after = (artifact_in(each / "ours") for each in (folder, tmp_path))
    assert before.key != after.key
    assert before.provenance["origin"]["license"] == "openrail"


def test_a_pipeline_may_lack_its_tokenizer_config(folder: Path, tmp_path: Path):
    (copied(folder, tmp_path) / "tokenizer/tokenizer_config.json").unlink()
    done = in_process("import", "theirs", "--out", "ours", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


SCHEDULER = "scheduler/scheduler_config.json"
BETAS = "error: scheduler_config.json has trained_betas that are not of its beta_schedule scaled_linear"
SKIPPED = {"rescale_betas_zero_snr": True, "prediction_type": "sample"}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        (SCHEDULER, {"trained_betas": [0.1]}, BETAS),
        (SCHEDULER, {"thresholding": True}, "scheduler_config.json has thresholding"),
        (SCHEDULER, SKIPPED, "its timestep_spacing leading skips that step"),
        ("unet/config.json", {"timestep_post_act": "silu"}, "timestep_post_act 'silu': our network knows None"),
        ("unet/config.json", {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn 'silu': our network knows None"),
        ("unet/config.json", {"downsample_padding": 2}, "downsample_padding 2: our network knows 1 alone"),
        (
            "unet/config.json",
            {"resnet_time_scale_shift": "ada_group"},
            "'ada_group': our network knows 'default'",
        ),
        ("unet/config.json", {"block_out_channels": []}, "its config.json is not whole"),
        ("unet/config.json", {"attention_head_dim": [2, 2, 1]}, "attention_head_dim"),
        ("unet/config.json", {"attention_head_dim": [2, 1]}, "[2, 1]: our network has heads of one size"),
        ("unet/config.json", {"cross_attention_dim": 6}, "tensors have other shapes"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a whole pipeline: name one of its"),
    ],
)
def test_a_pipeline_that_ours_can_t_follow_is_refused(
    folder: Path, tmp_path: Path, file: str, changes: dict, words: str
):
    changed(copied(folder, tmp_path) / file, changes)
    assert_refused(in_process("import", "theirs", "--out", "ours", cwd=tmp_path), words)
    assert not (tmp_path / "ours").exists()
