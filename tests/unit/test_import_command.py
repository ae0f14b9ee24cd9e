"""`cascade import`: what it prints and leaves behind; one line, and nothing written, for a file that does not fit."""

import json
import os
import pickle
import re
import uuid
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.data.encoding import describe_autoencoder
from components.models.bundle import load_bundle
from components.runtime.storage.store import Store, digest_of
from components.sampling.model import load_model
from components.weights.files import read_weights
from pipelines.recipes.catalog import load_recipe
from tests.foreign_weights import (
    adm_layers,
    first_stage_layers,
    glide_layers,
    gpt_layers,
    mindalle_tables,
    tensors_of,
    words_of,
)
from tests.in_process import Done, finished, in_process
from tests.peer_unets import peer_autoencoder
from tests.refusals import assert_refused
from tests.tiny_cascade import artifact_in

STAGE = "ddpm/base"  # 16², 32 to 128 channels, without labels


def adm(**changes: object) -> dict[str, Tensor]:
    """A U-Net of guided-diffusion of the stage's size."""
    return tensors_of(adm_layers(**{**SIZES, **changes}), device="cpu")


SIZES = {"width": 32, "mult": (1, 2, 4), "blocks": 1, "attention": (2, 4), "out_channels": 3}


class Opened:
    """A pickle that runs code where it is opened."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("opened",)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return adm()


def imported(folder: Path, *arguments: str, stage: str = STAGE) -> Done:
    """The command on the file or folder `theirs…` there."""
    (theirs,) = folder.glob("theirs*")
    return in_process("import", theirs.name, "--as", stage, "--out", "ours", *arguments, cwd=folder)


def test_settings_of_no_recipe_are_refused(tmp_path: Path):
    done = in_process("import", "theirs.pt", "--set", "base.num_res_blocks=3", "--out", "ours", cwd=tmp_path)
    assert_refused(done, "--set base.num_res_blocks=3 changes the recipe of --as: name one, or leave --set out")


@pytest.mark.parametrize("out", ["theirs.pt", "theirs.pt/below", "/proc/nope"])
def test_an_out_that_is_no_folder_is_refused_before_the_file_is_read(tmp_path: Path, out: str):
    (tmp_path / "theirs.pt").write_bytes(b"no weights")
    done = in_process("import", "theirs.pt", "--as", STAGE, "--out", out, cwd=tmp_path)
    assert_refused(done, f"--out {out}: ", "is no folder that can be written to; name another")


def assert_nothing_written(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if not path.name.startswith("theirs")] == []


@pytest.mark.parametrize("form", ["safetensors", "pt", "ckpt"])
def test_a_file_becomes_a_model_that_samples(tmp_path: Path, weights: dict[str, Tensor], form: str):
    file = tmp_path / f"theirs.{form}"
    if form == "safetensors":
        save_file(weights, file)
    else:
        torch.save(weights if form == "pt" else {"state_dict": weights, "epoch": 3}, file)
    done = imported(tmp_path)
    assert done.returncode == 0, done.stderr
    counts, model, following = done.stdout.splitlines()
    assert f"{len(weights)} tensors read, 0 missing, 0 unused; " in counts
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} parameters" in counts
    artifact = artifact_in(tmp_path / "ours")
    assert model == f"model: {artifact.identity} in ours"
    origin = artifact.provenance["origin"]
    assert (origin["uri"], origin["sha256"]) == (str(file), digest_of(file).sha256)
    with artifact.local_copy() as folder:  # it is sampled as its recipe is
        assert load_model("base", folder).sampling == load_recipe("ddpm", []).sampling.base
    if form == "safetensors":  # the line that is printed can be typed
        assert following == "next: cascade sample --model ours"
        done = finished(*following.split()[2:], "--count", "1", "--steps", "2", cwd=tmp_path)
        assert Image.open(tmp_path / "samples" / "unconditional-diffusion-0000.png").size == (16, 16)


def test_the_same_file_is_the_same_model_wherever_it_lies(tmp_path: Path, weights: dict[str, Tensor]):
    keys = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        save_file(weights, tmp_path / place / f"theirs_{place}.safetensors")
        assert imported(tmp_path / place).returncode == 0
        first = (tmp_path / place / "ours/manifest.json").read_bytes()
        assert imported(tmp_path / place).returncode == 0
        assert (tmp_path / place / "ours/manifest.json").read_bytes() == first
        keys.append(json.loads(first)["key"])
    assert keys[0] == keys[1]
    before = first
    save_file(adm() | {"out.2.bias": torch.ones(3)}, tmp_path / "there/theirs_there.safetensors")
    assert_refused(imported(tmp_path / "there"), "ours holds another model", "name a new folder")
    assert (tmp_path / "there/ours/manifest.json").read_bytes() == before


def test_files_and_models_lie_in_storage_too(tmp_path: Path, weights: dict[str, Tensor]):
    save_file(weights, tmp_path / "theirs.safetensors")
    folder = f"memory://import-{uuid.uuid4().hex}"
    Store(folder).upload(tmp_path / "theirs.safetensors", "theirs.safetensors")
    done = finished("import", f"{folder}/theirs.safetensors", "--as", STAGE, "--out", f"{folder}/ours", cwd=tmp_path)
    assert in_process("verify", "--model", f"{folder}/ours", cwd=tmp_path).returncode == 0
    done = in_process("import", f"{folder}/none.pt", "--as", STAGE, "--out", f"{folder}/none", cwd=tmp_path)
    assert_refused(done, "none.pt: no such file")
    assert not Store(folder).exists("none")


def test_a_model_of_ours_is_copied_from_another_store_with_its_origin(tmp_path: Path, weights: dict[str, Tensor]):
    save_file(weights, tmp_path / "theirs.safetensors")
    folder = f"memory://import-{uuid.uuid4().hex}"
    done = finished("import", "theirs.safetensors", "--as", STAGE, "--out", f"{folder}/ours", cwd=tmp_path)
    (model,) = re.findall(r"model: (\S+)", done.stdout)
    assert_refused(in_process("import", f"{folder}/ours", "--as", STAGE, "--out", "own", cwd=tmp_path), "leave --as")
    for source, out in ((f"{folder}/ours", "own"), ("own", "again")):
        done = finished("import", source, "--out", out, cwd=tmp_path)
        assert in_process("verify", "--model", out, cwd=tmp_path).returncode == 0
    first, *copies = map(artifact_in, (f"{folder}/ours", tmp_path / "own", tmp_path / "again"))
    assert [each.provenance for each in copies] == [first.provenance] * 2
    assert first.identity == model != copies[0].identity == copies[1].identity
    (bundle,) = {path.parent for path in (tmp_path / "own").glob("attempt-*/model.safetensors")}
    done = in_process("import", str(bundle), "--out", "of_a_folder", cwd=tmp_path)  # without a manifest
    found = artifact_in(tmp_path / "of_a_folder")
    assert (found.identity, found.provenance["origin"]["uri"]) == (copies[0].identity, str(bundle))
    (bundle / "model.safetensors").write_bytes(b"damaged")
    assert_refused(in_process("import", "own", "--out", "damaged", cwd=tmp_path), "model.safetensors")
    assert_refused(in_process("import", str(bundle), "--out", "again", cwd=tmp_path), "again holds another model")
    assert not (tmp_path / "damaged").exists()


def test_a_model_in_several_files_is_that_of_one(tmp_path: Path):
    peer = peer_autoencoder(8, 8)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    index = tmp_path / "theirs/diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    finished("import", "theirs", "--out", "ours", cwd=tmp_path)
    peer.save_pretrained(tmp_path / "one/theirs")
    assert in_process("import", "one/theirs", "--out", "of_one", cwd=tmp_path).returncode == 0
    stored = [load_file(next((tmp_path / name).glob("attempt-*/model.safetensors"))) for name in ("ours", "of_one")]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    last = sorted((tmp_path / "theirs").glob("*.safetensors"))[-1]
    last.rename(tmp_path / "elsewhere")
    assert_refused(in_process("import", "theirs", "--out", "none", cwd=tmp_path), f"{last.name}: no such file")
    gone = "theirs/none.safetensors.index.json"
    assert_refused(in_process("import", gone, "--out", "none", cwd=tmp_path), f"{gone}: no such file")
    index.write_text("{}")
    assert_refused(
        in_process("import", "theirs", "--out", "none", cwd=tmp_path), "no weight_map that names their files"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stated", ["license: mit", "license:\n- mit\n- apache-2.0"])
def test_the_license_of_a_card_is_the_first_that_it_names(stated: str, tmp_path: Path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text(f"---\n{stated}\ntags: [art]\n---\n")
    assert read_weights(str(tmp_path)).license == "mit"
    assert read_weights(str(tmp_path / "model.safetensors")).license == "mit"


def test_a_folder_of_diffusers_says_itself_what_it_is_and_stages_take_it(tmp_path: Path):
    peer_autoencoder(8, 8).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/README.md").write_text("---\nlicense: mit\n---\n")
    done = finished("import", "theirs", "--out", "ours", cwd=tmp_path)
    artifact = artifact_in(tmp_path / "ours")
    assert describe_autoencoder(artifact).diffused_shape == (4, 8, 8)
    with artifact.local_copy() as folder:
        assert load_bundle(folder).settings["origin"]["license"] == "mit"
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.png")
    following = re.search(r"^next: cascade (.*)$", done.stdout, re.MULTILINE).group(1)
    assert in_process(*following.split(), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("ddpm", "name a stage, ddpm/base"),
        ("ddpm/vae", "name a stage, ddpm/base"),
        ("dpm/base", "no recipe 'dpm'; did you mean 'ddpm'?"),
        ("dit/base", "U-Net of guided-diffusion or improved-diffusion, but dit/base takes a network dit"),
        ("openmoji/tokenizer", "but openmoji/tokenizer takes a network autoencoder"),
        ("openmoji/base", "openmoji/base reads captions, and no U-Net of guided-diffusion"),
    ],
)
def test_a_stage_that_can_t_take_it_is_refused(tmp_path: Path, weights: dict[str, Tensor], stage: str, words: str):
    save_file(weights, tmp_path / "theirs.safetensors")
    assert_refused(imported(tmp_path, stage=stage), words)
    assert_nothing_written(tmp_path)


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: without(own, "out.0.weight", "middle_block.1.qkv.bias"), ("2 tensors of ddpm/base are missing",)),
        (lambda own: own | {"x.weight": torch.ones(1)}, ("1 tensors have no place in ddpm/base, first x.weight",)),
        (lambda own: own | {"out.2.bias": torch.ones(6)}, ("out.2.bias: [6], not [3]",)),
        (lambda own: adm(width=64), ("tensors have other shapes than in ddpm/base",)),
        (lambda own: adm(blocks=2), ("tensors have no place in ddpm/base, first ",)),
        (lambda own: {"a.weight": torch.ones(1), "b": torch.ones(1)}, ("holds names as a.weight, b, of no family",)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, weights: dict, change, words: tuple[str, ...]):
    save_file(change(weights), tmp_path / "theirs.safetensors")
    assert_refused(imported(tmp_path), "theirs.safetensors", *words)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, weights: dict[str, Tensor], kept: int):
    save_file(weights, tmp_path / "theirs.safetensors")
    whole = (tmp_path / "theirs.safetensors").read_bytes()
    (tmp_path / "theirs.safetensors").write_bytes(whole[:kept])
    assert_refused(imported(tmp_path), "theirs.safetensors is no whole safetensors file", "fetch it again")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_stays_closed(tmp_path: Path, weights: dict[str, Tensor], legacy: bool):
    if legacy:  # as those of EDM, which are no files of torch.save
        (tmp_path / "theirs.pkl").write_bytes(pickle.dumps({"ema": Opened()}))
        assert_refused(imported(tmp_path), "theirs.pkl", "stays closed", "components/weights/README.md")
        (tmp_path / "theirs.pkl").unlink()
    content = {"state_dict": weights, "callbacks": Opened()}
    torch.save(content, tmp_path / "theirs.ckpt", _use_new_zipfile_serialization=not legacy)
    assert_refused(imported(tmp_path), "theirs.ckpt asks for", "mkdir", "stays closed", "components/weights/README.md")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("theirs.pt", b"", "can't be read as a file of torch"),
        ("theirs.bin", b"PK\x03\x04 no archive", "can't be read as a file of torch"),
        ("theirs.txt", b"", "holds no weights"),
        ("theirs.pt", {0: torch.ones(1), 1: torch.ones(1)}, "theirs.pt holds no tensors by name: give a state_dict"),
    ],
)
def test_a_file_that_is_no_weights_is_refused(tmp_path: Path, name: str, content: bytes | dict, words: str):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    assert_refused(imported(tmp_path), words)
    assert_nothing_written(tmp_path)


def test_a_pipeline_and_a_file_that_is_not_there_are_refused(tmp_path: Path):
    (tmp_path / "theirs/unet").mkdir(parents=True)
    (tmp_path / "theirs/model_index.json").write_text("{}")
    (tmp_path / "theirs/unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert_refused(imported(tmp_path), "is a whole pipeline: name one of its folders, unet")
    done = in_process("import", "none.pt", "--as", STAGE, "--out", "ours", cwd=tmp_path)
    assert_refused(done, "none.pt: no such file")
    assert_nothing_written(tmp_path)


def test_weights_of_16_bits_are_stored_in_32(tmp_path: Path, weights: dict[str, Tensor]):
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "theirs.safetensors")
    assert imported(tmp_path).returncode == 0
    (stored,) = (tmp_path / "ours").glob("attempt-*/model.safetensors")
    conv_in = load_file(stored)["conv_in.weight"]
    torch.testing.assert_close(conv_in, weights["input_blocks.0.0.weight"].half().float())


def test_a_model_that_reads_captions_comes_with_its_tokenizer(tmp_path: Path):
    """A small GLIDE: one line without a tokenizer or with another; prompts are read by its words."""
    unet = {"mult": (1, 2), "blocks": 1, "attention": (2,), "out_channels": 3}
    tables = {name: (6, 16) for name in ("positional_embedding", "padding_embedding")}
    tensors = tensors_of(glide_layers(16, 1, words=4, text=16, **unet), device="cpu", **tables)
    save_file(tensors, tmp_path / "theirs.safetensors")
    sizes = "model_channels=16 channel_mult=[1,2] num_res_blocks=1 attention_resolutions=[8] head_dim=16 text_layers=1 "
    sizes += "text_dim=16 text_heads=2 text_padding=learned text_conditioning=cross_attention scale_shift_norm=true "
    sizes += "resample_in_blocks=true"
    sets = [each for size in sizes.split() for each in ("--set", f"base.{size}")]
    command = ["import", "theirs.safetensors", "--as", "glide/base", "--out", "ours", *sets]
    assert_refused(in_process(*command, cwd=tmp_path), "give the tokenizer of this model, --tokenizer FILE")
    command.append("--tokenizer")
    words_of("a", "b").bpe.save(str(tmp_path / "theirs_others.json"))
    words_of("a", "b", "c", "d", "<|endoftext|>").bpe.save(str(tmp_path / "theirs_more.json"))
    (tmp_path / "theirs_none.json").write_text("{}")
    for name, fault in {
        "theirs_others.json": "has no word <|endoftext|>: it is not the tokenizer of this U-Net of GLIDE",
        "theirs_more.json": "has a word 4 where the model has 4",
        "theirs_none.json": "theirs_none.json is no tokenizer.json",
        "none.json": "none.json: no such file",
    }.items():
        assert_refused(in_process(*command, name, cwd=tmp_path), fault)
    assert_nothing_written(tmp_path)
    words_of("a", "red", "circle", "<|endoftext|>").bpe.save(str(tmp_path / "theirs_words.json"))
    done = finished(*command, "theirs_words.json", cwd=tmp_path)
    asked = ["sample", "--model", "ours", "--prompt", "red circle", "--count", "1", "--steps", "2"]
    done = finished(*asked, cwd=tmp_path)
    done = in_process("import", "theirs.safetensors", "--as", STAGE, "--out", "none", cwd=tmp_path)
    assert_refused(done, "the U-Net of GLIDE reads captions, and ddpm/base reads none: name another stage")


def test_of_all_models_of_a_checkpoint_the_one_that_reads_captions_gets_the_tokenizer(tmp_path: Path):
    """A small minDALL-E; the tokenizer is in the key."""
    first_stage = first_stage_layers(32, (1, 2), 1, (1,), 32, (32, 32))
    parts = {"stage1": tensors_of(first_stage, device="cpu", quantize__embedding__weight=(16, 32))}
    tables = mindalle_tables(16, codes=16, words=4, texts=6, places=16)
    parts["stage2"] = tensors_of(gpt_layers(16, 1), device="cpu", **tables)
    tensors = {f"{part}.{name}": each for part, own in parts.items() for name, each in own.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    sizes = "tokenizer.resolution=8 tokenizer.channels=32 tokenizer.channel_mult=[1,2] tokenizer.num_res_blocks=1 "
    sizes += "tokenizer.attention_resolutions=[4] tokenizer.latent_channels=32 tokenizer.bottleneck.codebook_size=16 "
    sizes += "prior.model_dim=16 prior.num_heads=2 prior.num_layers=1"
    sets = [each for size in sizes.split() for each in ("--set", size)]
    stage, given = "mindalle_text_prior/cascade", ("--tokenizer", "theirs_words.json")
    assert_refused(imported(tmp_path, *sets, stage=stage), "prior reads captions: give the tokenizer of this model")
    assert_nothing_written(tmp_path)
    keys = []
    for words in (("a", "red", "circle", "[PAD]"), ("red", "a", "circle", "[PAD]")):
        words_of(*words).bpe.save(str(tmp_path / "theirs_words.json"))
        command = ("import", "theirs.safetensors", "--as", stage, *sets, *given, "--out", words[0])
        done = finished(*command, cwd=tmp_path)
        artifact = artifact_in(tmp_path / words[0])
        assert [name for name in artifact.names() if name.endswith("bpe.json")] == ["prior/bpe.json"]
        keys.append(artifact.key)
    assert keys[0] != keys[1]
    done = finished("sample", "--model", "a", "--prompt", "red circle", "--count", "1", cwd=tmp_path)
    command = ("import", "theirs.safetensors", "--as", "imagenet_class_prior/cascade", *given, "--out", "none")
    done = in_process(*command, cwd=tmp_path)
    assert_refused(done, "no model of", "reads captions itself: leave --tokenizer out")
