"""Recipes of the continuous branch: networks that do not fit each other are refused before anything starts."""

import sys
from pathlib import Path

import pytest

from components.configuration.usage import UsageError
from components.models.autoencoder import Autoencoder
from components.sampling.frozen_text import FrozenTextError
from components.stages.precompute import TextEncoderConfig, encoder_identity
from components.weights.files import fetch_encoder
from components.weights.starts import config_identity
from pipelines.planning.preflight import Needs, check_needs
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.recipes.systems import vae_gan
from pipelines.workflows import build_workflow
from tests.in_process import in_process
from tests.refusals import assert_refused, one_line
from tests.unit.test_frozen_text import pretrained_folder


@pytest.mark.parametrize(
    "bottleneck",
    [
        {"kind": "gaussian"},
        {"kind": "vq_ema", "codebook_size": 16},
        {"kind": "vq", "codebook_size": 16, "codebook_dim": 5},
        {"kind": "gumbel", "codebook_size": 16},
        {"kind": "fsq", "levels": (4, 4)},
    ],
)
def test_the_channels_of_latents_are_known_without_the_network(bottleneck: dict) -> None:
    sizes = {"channels": 32, "latent_channels": 8, "perceptual_network": "none", "perceptual_weight": 0.0}
    config = vae_gan().replace(**sizes, bottleneck=bottleneck)
    assert config.network.diffused_channels == Autoencoder(**config.network_arguments()).diffused_shape[0]


def asked_by(uri: str) -> Needs:
    """What Imagen needs with the pretrained encoder at `uri`."""
    imagen = RECIPES["imagen"]()
    numbers = imagen.model_dump() | {"contrastive": None, "text_encoder": TextEncoderConfig(uri=uri)}
    return Needs(tuple(stage.config for stage in build_workflow(type(imagen)(**numbers)).stages))


def test_a_text_encoder_and_its_library_are_looked_for_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert TextEncoderConfig(uri="encoder").uri == str(tmp_path / "encoder")  # the same for a worker in another folder
    assert TextEncoderConfig(uri="s3://bucket/encoder").uri == "s3://bucket/encoder"
    check_needs(needs := asked_by(str(pretrained_folder(tmp_path / "encoder", "bert", length=None))))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # as where it is not installed
        with pytest.raises(UsageError, match=r"needs transformers: pip install 'image-cascade\[text\]'"):
            check_needs(needs)
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    for place, lacks in (("encoder", r"lacks tokenizer\.json"), ("nowhere", r"lacks config\.json, tokenizer\.json")):
        with one_line(UsageError, match=lacks):
            check_needs(asked_by(str(tmp_path / place)))


def test_a_text_encoder_in_a_package_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "package://own_encoder/model"
    with pytest.raises(FrozenTextError, match=r"package://own_encoder/model is in a package: pip install own-encoder$"):
        encoder_identity(TextEncoderConfig(uri=uri))
    pretrained_folder(tmp_path / "own_encoder" / "model", "bert", length=None)
    (tmp_path / "own_encoder" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "own_encoder-1.2.dist-info").mkdir()
    (tmp_path / "own_encoder-1.2.dist-info" / "METADATA").write_text("Name: own_encoder\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_needs(asked_by(uri))
    identity = encoder_identity(TextEncoderConfig(uri=uri))
    assert identity == config_identity(TextEncoderConfig(uri=uri)) | {"package": "1.2"}
    fetched = fetch_encoder(uri, tmp_path / "copy")
    packed = tmp_path / "own_encoder" / "model" / "model.safetensors"
    assert (fetched / "model.safetensors").read_bytes() == packed.read_bytes()
    elsewhere = TextEncoderConfig(uri="s3://bucket/encoder")
    assert encoder_identity(elsewhere) == config_identity(elsewhere)


def test_a_missing_text_encoder_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    options = ["--recipe", "ldm_text_to_image", "--set", f"text_encoder.uri={tmp_path}/nowhere"]
    for setting in ("autoencoder.perceptual_network=none", "images.source=scenes", "images.limit=8"):
        options += ["--set", setting]
    done = in_process("run", *options, cwd=tmp_path)
    assert_refused(done, f"error: {tmp_path}/nowhere holds no text encoder")
    assert not list(tmp_path.glob("runs/stages/*"))


def test_what_is_made_beforehand_is_what_base_and_prior_read() -> None:
    """Small images alone, too, which need no other network; an upsampler without captions waits for no text."""
    imagen = build_workflow(RECIPES["imagen"]())
    assert {"precompute", "text_encoder"} <= imagen.before("base")
    assert imagen.before("upsampler_32") == {"images"}
    assert "upsampler_32" not in imagen.before("base")  # trained at the same time
    workflow = build_workflow(load_recipe("dalle2", []))
    assert {"precompute", "contrastive"} <= workflow.before("base") & workflow.before("diffusion_prior")
    assert workflow.before("precompute") == {"images", "contrastive"}
    small = build_workflow(load_recipe("depth_diffusion", ["precompute.resolution=32"]))
    assert small.before("base") == {"images", "precompute"}
