"""`cascade reconstruct`: an image, its codes as colors and its reconstruction; one line for what can't be done."""

import io
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from components.configuration.usage import UsageError
from components.models.autoencoder import Autoencoder
from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.sampling.answers import predictor_of
from components.sampling.image_files import base64_png, encode_png
from components.sampling.images import from_uint8, index_grids, to_uint8
from components.sampling.requests import RequestRow
from components.training.learner import make_network
from pipelines.command.reconstruct import reconstruct_images
from tests.in_process import in_process
from tests.refusals import assert_refused, one_line
from tests.tiny_autoencoders import RECIPES, config_of
from tests.tiny_cascade import commit_model, write_cascade, write_models

SIDE = 8
WITH_CODES = ("vq_vae", "vq_vae_ema", "dvae", "fsq")


def write_autoencoder(folder: Path, name: str, **changes: object) -> Path:
    """The bundle of a tiny autoencoder whose codes differ between images."""
    torch.manual_seed(4)
    arguments = config_of(name).network_arguments() | changes
    network = Autoencoder(**arguments).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_bundle(folder, ModelBundle("autoencoder", arguments, {"resolution": SIDE}, network))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as users have them: of the model's size, and a larger one that is not square."""
    folder, numbers = tmp_path_factory.mktemp("images"), np.random.default_rng(2)
    (folder / "small.png").write_bytes(encode_png(numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))
    Image.fromarray(numbers.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    (folder / "text.png").write_text("no image")
    return folder


def reconstructed(model: Path | str, *images: Path, out: Path) -> tuple[Path, str]:
    """The image that shows all, and what is printed."""
    console = Console(file=io.StringIO(), width=200)
    shown = reconstruct_images(str(model), images=images, tracking=None, out=out, console=console)
    return shown, console.file.getvalue()


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_what_the_model_makes_and_answers(name: str, files: Path, tmp_path: Path) -> None:
    model = write_autoencoder(tmp_path / "m", name)
    shown, said = reconstructed(model, files / "small.png", files / "photo.jpg", out=tmp_path / "out")
    network, predict = load_bundle(model).module, predictor_of(model)
    for stem in ("small", "photo"):
        seen = pixels(tmp_path / "out" / f"{stem}-input.png")
        made = pixels(tmp_path / "out" / f"{stem}-reconstruction.png")
        assert seen.shape == made.shape == (SIDE, SIDE, 3)
        np.testing.assert_array_equal(made, to_uint8(network.reconstruct(from_uint8(seen)[None]))[0])
        if name in WITH_CODES:  # a registered Gaussian makes images of nothing
            assert predict([RequestRow(image=base64_png(seen))]) == [base64_png(made)]
        noise = np.square(seen.astype(float) - made).mean()
        assert f"{10 * math.log10(255**2 / noise):.1f} dB" in said
        assert (tmp_path / "out" / f"{stem}-codes.png").is_file() == (name in WITH_CODES)
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "small-input.png"), pixels(files / "small.png"))
    assert pixels(shown).shape[1] > 2 * 128  # a column for each image
    assert len(said.strip().splitlines()) == 2


@pytest.mark.parametrize("name", WITH_CODES)
def test_equal_places_of_the_codes_image_are_equal_codes(name: str, files: Path, tmp_path: Path) -> None:
    model = write_autoencoder(tmp_path / "m", name)
    _, said = reconstructed(model, files / "small.png", out=tmp_path / "out")
    network = load_bundle(model).module
    indices = network.tokenize(from_uint8(pixels(files / "small.png"))[None])[0]  # (h, w)
    height, width = indices.shape
    step = SIDE // height
    drawn = pixels(tmp_path / "out" / "small-codes.png")
    np.testing.assert_array_equal(drawn, drawn[::step, ::step].repeat(step, axis=0).repeat(step, axis=1))
    colors, flat = drawn[::step, ::step].reshape(-1, 3), indices.flatten().numpy()
    assert len(set(flat.tolist())) > 1
    np.testing.assert_array_equal((colors[:, None] == colors).all(axis=-1), flat[:, None] == flat)
    bits = height * width * math.log2(network.codebook_size)
    assert f"{height} x {width} codes of {network.codebook_size}: {bits:,.0f} bits for {SIDE * SIDE * 24:,}" in said


def test_a_network_without_codes_has_no_index_grid() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        index_grids(make_network(config_of("vae")), np.zeros((1, SIDE, SIDE, 3), np.uint8))


def test_a_model_is_found_on_disk_in_storage_and_in_a_cascade(files: Path, tmp_path: Path) -> None:
    folder = write_autoencoder(tmp_path / "m", "vq_vae")
    stored = commit_model(tmp_path, "tokenizer", "1a2b", folder)
    made = []
    for number, model in enumerate((folder, stored.root)):
        reconstructed(model, files / "photo.jpg", out=tmp_path / str(number))
        made.append(pixels(tmp_path / str(number) / "photo-reconstruction.png"))
    np.testing.assert_array_equal(*made)
    _, said = reconstructed(write_cascade(tmp_path / "c"), files / "photo.jpg", out=tmp_path / "cascade")
    assert "4 x 4 codes of 32: 80 bits" in said  # of its tokenizer


def test_gray_images_are_shown_and_maps_of_classes_are_read_as_class_numbers(files: Path, tmp_path: Path) -> None:
    gray = write_autoencoder(tmp_path / "gray", "vq_vae", image_channels=1)
    _, said = reconstructed(gray, files / "small.png", out=tmp_path / "out")
    assert "codes of 16" in said
    assert (np.ptp(pixels(tmp_path / "out" / "small-reconstruction.png"), axis=2) == 0).all()
    maps = write_autoencoder(tmp_path / "maps", "vq_vae", image_channels=182)
    with pytest.raises(UsageError, match="reads maps of 182 channels"):
        reconstructed(maps, files / "small.png", out=tmp_path / "none")
    values = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 182
    (tmp_path / "map.png").write_bytes(encode_png(values))
    maps = write_autoencoder(tmp_path / "classes", "vq_vae", image_channels=182, reconstruction="classes")
    _, said = reconstructed(maps, tmp_path / "map.png", out=tmp_path / "out")
    assert re.search(r"[\d.]+% of pixels keep their class, .* bits for 480$", said.strip())
    seen = pixels(tmp_path / "out" / "map-input.png")
    assert (seen[..., 0] == np.rint(255 * values.astype(int) / 181)).all()
    few = write_autoencoder(tmp_path / "few", "vq_vae", image_channels=7, reconstruction="classes")
    with pytest.raises(UsageError, match=r"map\.png: the mask holds the value 63, .*; it reads 7 classes$"):
        reconstructed(few, tmp_path / "map.png", out=tmp_path / "none")


def test_images_that_are_called_alike_are_kept_apart(files: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "small.png").write_bytes(encode_png(np.zeros((SIDE, SIDE, 3), np.uint8)))
    model = write_autoencoder(tmp_path / "m", "fsq")
    reconstructed(model, files / "small.png", tmp_path / "other" / "small.png", out=tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").glob("*-input.png"))
    assert written == ["small-0-input.png", "small-1-input.png"]


def test_what_is_no_autoencoder_and_what_is_no_image_are_one_line(files: Path, tmp_path: Path) -> None:
    models, autoencoder = write_models(tmp_path / "models"), write_autoencoder(tmp_path / "m", "vae")
    cases = [
        (models["prior"], "small.png", r"prior is no autoencoder but a transformer; give a vae"),
        (tmp_path / "nothing", "small.png", r"no model at .*nothing; give models:/NAME@champion"),
        (autoencoder, "missing.png", r"--image .*missing.png: no such file"),
        (autoencoder, "text.png", r"--image .*text.png: the given image can't be read"),
    ]
    for model, image, words in cases:
        with one_line(UsageError, match=words):
            reconstructed(model, files / image, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_it_kept_and_ends_in_exit_code_2(files: Path, tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "m", "vq_vae")
    ended = partial(in_process, "reconstruct", cwd=tmp_path)
    done = ended("--model", "m", "--image", str(files / "small.png"), "--image", str(files / "photo.jpg"))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r" dB, 4 x 4 codes of 16: 64 bits for 1,536", done.stdout)) == 2
    assert "side by side: reconstructed/side_by_side.png" in done.stdout
    refused = ended("--model", "m", "--image", str(files / "text.png"))
    assert_refused(refused, "error: --image")
    assert "Examples" in ended("--help").stdout
