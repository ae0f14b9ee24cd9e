"""`cascade export --as pt2 | onnx`: programs of every kind of network compute the same, for any batch size."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from components.models.bundle import NETWORKS, ModelBundle, load_bundle, save_bundle
from components.sampling.cascade import compose
from components.weights import programs
from tests.in_process import in_process
from tests.peer_unets import SMALL_DIT, SMALL_UNET
from tests.refusals import assert_refused, one_line
from tests.tiny_cascade import CLASSES, PRIOR, TEXT, TOKENIZER, write_model
from tests.tiny_generators import LONE, PIXELS, PLAIN, write

WORDS = {"vocab_size": 20, "text_length": 5}
EVERYTHING = {"num_classes": 5, "text": TEXT, "low_res": True, "condition_image_channels": 1, "image_embedding_dim": 6}
STATES = {"text_states_dim": 6, "text_conditioning": "spatial_transformer"}
PATCHES = {"text_conditioning": "cross_attention", "image_token_dim": 6, "image_patch_size": 2}
ONE_LEVEL = {**SMALL_UNET, "channel_mult": (1,), "attention_resolutions": (8,)}
TWO_LEVELS = {**TOKENIZER, "resolution": 8, "channels": 8, "channel_mult": [1, 1]}
CONTRASTIVE = {"resolution": 8, "channels": 8, "channel_mult": [1], "num_res_blocks": 1, "patch_size": 4}
EMBEDDING = {"embedding_dim": 6, "text_length": 5, "text_dim": 4, "model_dim": 8, "num_layers": 1, "num_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {**SMALL_UNET, **EVERYTHING}),
    "unet of states": ("unet", {**ONE_LEVEL, **STATES}),
    "image attention": ("image_attention_unet", {**ONE_LEVEL, **PATCHES, "condition_image_channels": 3}),
    "dit": ("dit", {**SMALL_DIT, **EVERYTHING}),
    "classifier": ("classifier", {**SMALL_UNET, "num_classes": 5}),
    "codes": ("autoencoder", TWO_LEVELS),
    "gray": ("autoencoder", {**TWO_LEVELS, "image_channels": 1}),
    "gaussian": ("autoencoder", {**TWO_LEVELS, "bottleneck": {"kind": "gaussian"}}),
    "transformer": ("transformer", {**PLAIN, **WORDS, "num_classes": 3, "positions": "rotary_2d"}),
    "conditioned": ("transformer", {**PLAIN, "condition_codebook_size": 8, "condition_grid": [4, 4]}),
    "masked": ("masked_transformer", {**PLAIN, "num_classes": 3}),
    "pixelcnn": LONE["pixels"][:2],
    "row_lstm": ("row_lstm", {**PIXELS, "num_channels": 1, "num_values": 32, "embedding": "table"}),
    "gan": LONE["gan"][:2],
    "contrastive": ("contrastive", {**CONTRASTIVE, "embedding_dim": 6, "text": TEXT}),
    "diffusion_prior": ("diffusion_prior", EMBEDDING),
}
BY_ONNX = ("unet of states", "gaussian", "conditioned")  # every program of ONNX is made of one of torch


def written(folder: Path, name: str) -> ModelBundle:
    """A model on disk, with random weights in every layer."""
    kind, network = KINDS[name]
    torch.manual_seed(0)
    module = NETWORKS[kind](**network)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_bundle(folder, ModelBundle(kind, network, {"resolution": 4}, module))
    return load_bundle(folder)


def expected(bundle: ModelBundle, name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    (program,) = [each for each in programs.PROGRAMS if bundle.kind in each.kinds and each.name == name]
    with torch.no_grad():
        found = getattr(bundle.module, program.method)(**inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def inputs_of(described: dict[str, list[Any]], batch: int) -> dict[str, Tensor]:
    """Inputs as `programs.json` tells them."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (dtype, *sizes) in described.items():
        shape = [{"batch": batch, "length": 4}.get(size, size) for size in sizes]
        drawn = torch.randint(3, shape, generator=generator) if dtype == "int64" or name == "time" else None
        tensors[name] = torch.randn(shape, generator=generator) if drawn is None else drawn.to(getattr(torch, dtype))
    return tensors


def run(file: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the libraries of others make of a file."""
    if file.suffix == ".pt2":
        found = torch.export.load(file).module()(*inputs.values())
        return [found] if isinstance(found, Tensor) else list(found)
    session = onnxruntime.InferenceSession(file)
    assert [each.name for each in session.get_inputs()] == [*inputs]
    return [torch.from_numpy(each) for each in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "pt2") for name in KINDS if name not in BY_ONNX), *((name, "onnx") for name in BY_ONNX)]
)
def test_a_program_computes_what_the_network_computes(tmp_path: Path, name: str, form: str):
    bundle = written(tmp_path / "model", name)
    done = in_process("export", "model", "--as", form, "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    listed = json.loads((tmp_path / "made/programs.json").read_text())["programs"]
    assert {path.name for path in (tmp_path / "made").iterdir()} == {*listed, "programs.json", "README.md"}
    for file, about in listed.items():
        for batch in (1, 4):
            inputs = inputs_of(about["inputs"], batch)
            wanted = expected(bundle, file.partition(".")[0], inputs)
            for one, other in zip(run(tmp_path / "made" / file, inputs), wanted, strict=True):
                assert one.shape == other.shape
                assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max()


def test_every_kind_of_network_has_programs():
    assert {kind for program in programs.PROGRAMS for kind in program.kinds} == {*NETWORKS}
    assert {kind for kind, _ in KINDS.values()} == {*NETWORKS}


def test_each_model_of_a_cascade_has_a_folder_and_its_tokenizer(tmp_path: Path):
    prior = write_model(tmp_path / "models/prior", "transformer", PRIOR, {"grid": [4, 4], "classes": CLASSES})
    compose(tmp_path / "cascade", prior=prior, model=write(tmp_path / "models/model", *LONE["gan"]))
    done = in_process("export", "cascade", "--as", "pt2", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/cascade.json").read_bytes() == (tmp_path / "cascade/cascade.json").read_bytes()
    program = {"network.pt2", "programs.json"}
    assert {path.name for path in (tmp_path / "made/prior").iterdir()} == program | {"bpe.json"}
    assert {path.name for path in (tmp_path / "made/model").iterdir()} == program


def test_a_program_of_other_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = written(tmp_path / "model", "gan")
    monkeypatch.setattr(programs, "TOLERANCE", -1.0)
    (tmp_path / "made").mkdir()
    with one_line(ValueError, "the exported network differs by 0.0e[+]00 from the network: nothing is written"):
        programs.write_programs(bundle, tmp_path / "made", "pt2")
    assert not [*(tmp_path / "made").iterdir()]


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nope"])
def test_an_out_that_is_no_folder_is_refused_before_the_model_is_read(tmp_path: Path, out: str):
    (tmp_path / "file").touch()
    done = in_process("export", "none", "--as", "pt2", "--out", out, cwd=tmp_path)
    assert_refused(done, f"--out {out}: ", "is no folder that can be written to; name another")


def test_a_full_folder_no_model_and_missing_libraries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / "model", "gan")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    done = in_process("export", "model", "--as", "pt2", "--out", "full", cwd=tmp_path)
    assert_refused(done, "--out full holds something already: name a new folder")
    assert_refused(in_process("export", "none", "--as", "pt2", "--out", "made", cwd=tmp_path), "no model at none")
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    done = in_process("export", "model", "--as", "onnx", "--out", "made", cwd=tmp_path)
    assert_refused(done, "pip install 'image-cascade[export]'", "--as pt2")
    assert not (tmp_path / "made").exists()
