"""`cascade evaluate`: the figures are torch-fidelity's, of whatever holds the images; one line for a fault."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics

from components.data import given
from components.data.held_out import read_split
from components.data.shards import ShardIndex, View, load_index
from components.evaluation.features import FeatureExtractor, FeatureNetworkError
from components.evaluation.given import ClipScore, published_gaussian, requests_for
from components.runtime.storage.artifact import Artifact, commit_artifact, describe
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png
from tests import image_sets
from tests.feature_weights import clip_network, open_clip_network, write_inception
from tests.in_process import Done, finished, in_process
from tests.refusals import assert_refused, one_line
from tests.served_models import NAME, Registry
from tests.tiny_cascade import commit_model, write_cascade
from tests.tiny_generators import LONE, lone, write

COUNT = 12


def pixels(seed: int, count: int = COUNT) -> np.ndarray:
    """Smooth random images, (N, 24, 40, 3)."""
    small = torch.rand((count, 3, 4, 5), generator=torch.Generator().manual_seed(seed)) * (1 - 0.3 * seed)
    large = torch.nn.functional.interpolate(small, (24, 40), mode="bicubic", align_corners=False)
    return (255 * large).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def write_folder(folder: Path, images: np.ndarray) -> Path:
    (folder / "a").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "a" / f"{number:03d}.png").write_bytes(encode_png(image))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    write_inception(root / "w.pth")
    for seed, name in enumerate(("made", "real")):
        write_folder(root / name, pixels(seed))
    return root


def evaluated(root: Path, images: str, reference: str, *more: str, weights: tuple[str, ...] = ("w.pth",)) -> Done:
    given = [f"--feature-weights={name}" for name in weights]
    return in_process("evaluate", "--images", images, "--reference", reference, *given, *more, cwd=root)


def figures(
    root: Path, images: str, reference: str, *more: str, weights: tuple[str, ...] = ("w.pth",)
) -> dict[str, Any]:
    done = evaluated(root, images, reference, "--json", "out.json", *more, weights=weights)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "out.json").read_text())


def test_figures_are_those_of_torch_fidelitys_own_program(root: Path) -> None:
    """Of the distance, whose 2,048 complex eigenvalues take half a minute there, in test_evaluation_inception.py."""
    found = figures(root, "made", "real")
    theirs = calculate_metrics(
        input1=str(root / "made/a"), input2=str(root / "real/a"), feature_extractor_weights_path=str(root / "w.pth"),
        kid=True, isc=True, prc=True, kid_subset_size=COUNT, cuda=torch.cuda.is_available(), cache=False, verbose=False,
        feature_extractor="inception-v3-compat",
    )  # fmt: skip
    expected = {
        "kid_inception_12": theirs["kernel_inception_distance_mean"],
        "is_inception_12": theirs["inception_score_mean"],
        "precision_inception_12": theirs["precision"],
        "recall_inception_12": theirs["recall"],
    }
    assert found["figures"].pop("fid_inception_12") > 0
    assert found["figures"] == pytest.approx(expected, rel=1e-4)
    assert (found["samples"], found["reference_samples"], found["published_statistics"]) == (COUNT, COUNT, False)
    said = evaluated(root, "made", "real").stdout
    assert f"{COUNT} images against {COUNT} images of real" in said
    assert f"not the published weights (sha256 {found['sha256_of_weights']})" in said


def write_tar(path: Path, images: np.ndarray) -> None:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            data = encode_png(image)
            (info := tarfile.TarInfo(f"{number:03d}.png")).size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, images: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("read me.txt", "no image")
        for number, image in enumerate(images):
            archive.writestr(f"deep/{number:03d}.PNG", encode_png(image))


WRITERS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "made.tar": write_tar,
    "made.zip": write_zip,
    "made.npz": lambda path, images: np.savez(path, images),
    "packed.npz": lambda path, images: np.savez_compressed(path, labels=np.zeros(len(images)), images=images),
    "tars": lambda path, images: [
        path.mkdir(),
        write_tar(path / "0.tar", images[:9]),
        write_tar(path / "1.tar", images[9:]),
    ],
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_are_the_same_in_whatever_holds_them(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, pixels(0))
    parts = given.given_images(str(tmp_path / name))
    assert sum(part.num_images for part in parts) == COUNT
    np.testing.assert_array_equal(np.concatenate([images for part in parts for images in part.batches()]), pixels(0))


def test_images_of_an_archive_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["b.png", "__MACOSX/._b.png", "0.png", "a.png", "0-1.png"]
    files = {name: encode_png(np.full((8, 8, 3), ord(name[0]), np.uint8)) for name in names} | {
        names[1]: b"AppleDouble"
    }
    with zipfile.ZipFile(tmp_path / "given.zip", "w") as archive, tarfile.open(tmp_path / "given.tar", "w") as tar:
        for name in names:
            archive.writestr(name, files[name])
            (info := tarfile.TarInfo(name)).size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    for name in ("given.zip", "given.tar"):
        (part,) = given.given_images(str(tmp_path / name))
        found = [name for name, _ in given.contents(part.place, part.files[0].path)]
        assert [each.removesuffix(".png") for each in found] == [f"{name}/{key}" for key in ("0-1", "0", "a", "b")]


@pytest.mark.parametrize("change", [("flag_bits", 1), ("compress_type", 9)])  # encrypted; Deflate64, as Windows has it
def test_an_archive_that_can_not_be_opened_is_one_line(tmp_path: Path, change: tuple[str, int]) -> None:
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("0.png", encode_png(pixels(0, 1)[0]))
        setattr(archive.filelist[0], *change)
    with pytest.raises(ValueError, match=r"made\.zip can't be read as an archive"):
        given.given_images(str(tmp_path / "made.zip"))


def test_a_fault_of_an_archive_shows_no_signed_query() -> None:
    with one_line(ValueError, match=r"memory://made\.zip\?… can't be read as an archive") as caught:
        [*given.rows_of("memory://made.zip?signature=secret")]
    assert "secret" not in str(caught.value)


def test_images_of_several_sizes_are_measured_each_at_its_own(tmp_path: Path) -> None:
    for number, side in enumerate((8, 8, 9, 8)):
        (tmp_path / f"{number}.png").write_bytes(encode_png(np.full((side, 8, 3), number, np.uint8)))
    (part,) = given.given_images(str(tmp_path))
    assert [images.shape for images in part.batches()] == [(2, 8, 8, 3), (1, 9, 8, 3), (1, 8, 8, 3)]


def test_features_are_kept_beside_the_images_and_measured_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen, call = write_folder(root / "kept", pixels(0)), list[int](), FeatureExtractor.__call__
    monkeypatch.setattr(
        FeatureExtractor, "__call__", lambda self, images: seen.append(len(images)) or call(self, images)
    )
    monkeypatch.setattr(given, "MOST", 5)  # images of a part
    of_lite0 = partial(figures, root, "kept", "kept", "--network", "efficientnet_lite0", weights=())
    first = of_lite0()
    assert sum(seen) == COUNT  # the reference is the same folder
    assert of_lite0() == first
    assert (sum(seen), len([*folder.glob("features/*.npz")])) == (COUNT, 3)
    for file in folder.glob("features/*.npz"):
        file.write_bytes(b"damaged")
    assert of_lite0() == first
    (folder / "a/011.png").write_bytes(encode_png(pixels(1, 1)[0]))
    assert of_lite0() != first
    assert sum(seen) == 2 * COUNT + COUNT % 5


def test_published_statistics_stand_for_a_reference_of_their_own_protocol_alone(root: Path) -> None:
    whole = figures(root, "made", "real")
    kept = (np.load(file)["features"] for file in (root / "real/features").glob("*.npz"))
    (features,) = (each.astype(np.float64) for each in kept if each.shape[1] == 2048)
    published = {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}
    np.savez(root / "adm.npz", **published, arr_0=pixels(1)[:4])
    found = figures(root, "made", "adm.npz")
    assert found["figures"]["fid_inception_12"] == pytest.approx(whole["figures"]["fid_inception_12"], rel=1e-6)
    equal = {"precision", "recall", "kid"}  # of as many images of both sets as the smaller has
    names = {name.replace("_12", "_4") if name.partition("_")[0] in equal else name for name in whole["figures"]}
    assert (found["reference_samples"], found["figures"].keys()) == (4, names)
    np.savez(root / "statistics.npz", **published)
    bare = given.given_images(str(root / "statistics.npz"), needed=False)
    assert (bare, published_gaussian("real")) == ([], None)
    clean = figures(root, "made", "adm.npz", "--network", "inception_clean")
    assert {name.split("_")[1] for name in clean["figures"]} == {"clean"}
    assert not clean["published_statistics"]
    assert_refused(evaluated(root, "made", "statistics.npz", "--network", "inception_clean"), "holds no images")
    np.savez(root / "other.npz", mu=np.zeros(768), sigma=np.eye(768))
    assert_refused(evaluated(root, "empty", "other.npz"), "other.npz: statistics of 768 features, inception has 2048")


def test_a_network_without_a_classifier_has_no_inception_score(root: Path) -> None:
    found = figures(root, "made", "real", "--network", "efficientnet_lite0", weights=())["figures"]
    assert found.keys() == {f"{name}_efficientnet_lite0" for name in ("fd", "kid", "precision", "recall")}


def test_faults_are_one_line_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    (root / "broken").mkdir()
    (root / "broken/1.png").write_bytes(encode_png(pixels(0, 1)[0])[:200])
    (root / "broken.zip").write_bytes(b"PK no zip")
    (root / "text").mkdir()
    (root / "text/0.png").write_bytes(b"no image")
    (root / "empty").mkdir()
    (root / "empty/text.txt").write_text("no image")
    np.savez(root / "float.npz", np.zeros((3, 8, 8, 3)))
    before = sorted(root.rglob("*"))
    for images, words in {
        "nowhere": "nothing at",
        "empty": "holds no images",
        "broken": "broken/1.png can't be read",
        "text": "text/0.png can't be read (UnidentifiedImageError: cannot identify image file)",
        "made/a/000.png": "made/a/000.png is a single image",
        "broken.zip": "can't be read as an archive",
        "float.npz": "images are uint8",
    }.items():
        assert_refused(evaluated(root, images, "real", "--network", "efficientnet_lite0", weights=()), words)
    assert_refused(evaluated(root, "made", "real", weights=()), "needs feature_weights", "95,628,359 bytes")
    assert_refused(evaluated(root, "made", "real", weights=("no.pth",)), "no such file")
    assert_refused(evaluated(root, "made", "real", "--network", "inceptoin"), "feature_network")
    assert_refused(evaluated(root, "made", "real", "--json", "no/where.json"), "no such folder")
    assert_refused(evaluated(root, "made", "real", "--json", "made"), "is a folder: name a file in it")
    assert_refused(evaluated(root, "made", "real", "--json", "/proc/x.json"), "/proc/x.json can't be written")
    assert_refused(evaluated(root, "made", "real", "--seed", str(2**32)), "seed")
    assert_refused(evaluated(root, "made", "real", "--captions", str(root / "empty/text.txt")), "give --clip-weights")
    made = evaluated(root, "file:///made", "real", "--model", "nowhere")
    assert_refused(made, "samples of --model go to a folder of this machine")
    assert [path for path in sorted(root.rglob("*")) if "features" not in path.parts] == [
        path for path in before if "features" not in path.parts
    ]


def test_the_clip_score_is_that_of_transformers_own_outputs_and_of_the_center_of_an_image(tmp_path: Path) -> None:
    model, measure = clip_network(tmp_path), ClipScore(str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((images / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    ids = torch.tensor([[0, 3, 5, 1, 1], [0, 2, 4, 5, 1], [0, 4, 1, 1, 1]])
    with torch.inference_mode():
        found = model(input_ids=ids, pixel_values=pixels)
    expected = 100 * (found.logits_per_image.diag() / model.logit_scale.detach().exp()).clamp(min=0)
    captions = ["red heart", "a blue heart", "blue"]
    np.testing.assert_allclose(measure(images, captions), expected, rtol=1e-4, atol=1e-3)
    assert expected.max() > 0
    wide = np.pad(images, ((0, 0), (0, 0), (4, 4), (0, 0)))
    np.testing.assert_allclose(measure(wide, captions), measure(images, captions), rtol=1e-6)
    np.testing.assert_array_equal(measure(images[:1], ["red a a a"]), measure(images[:1], ["red a a a blue heart"]))


@pytest.mark.parametrize(
    ("file", "given", "quick_gelu"),
    [("open_clip_model.safetensors", "", True), ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.bin", False)],
)
def test_the_score_of_a_model_of_open_clip_is_its_own(tmp_path: Path, file: str, given: str, quick_gelu: bool) -> None:
    """By its own preparation of images of any size, for a hub's folder and a file in it."""
    model = open_clip_network(tmp_path, file=file, quick_gelu=quick_gelu)
    from open_clip.transform import PreprocessCfg, image_transform_v2

    prepare = image_transform_v2(PreprocessCfg(size=32, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25)), is_train=False)
    captions = ["red heart", "a blue heart", "blue", "red a a a blue heart"]
    ids = torch.tensor([[0, 3, 5, 1, 0, 0], [0, 2, 4, 5, 1, 0], [0, 4, 1, 0, 0, 0], [0, 3, 2, 2, 2, 1]])
    measure = ClipScore(str(tmp_path / given))
    for side in ((32, 32), (48, 80), (17, 23)):
        small = torch.rand((4, 3, 4, 5), generator=torch.Generator().manual_seed(sum(side)))
        images = torch.nn.functional.interpolate(small, side, mode="bicubic").clamp(0, 1).mul(255).byte()
        images = images.permute(0, 2, 3, 1).numpy()
        with torch.inference_mode():
            seen = model.encode_image(torch.stack([prepare(Image.fromarray(image)) for image in images]), True)
            read = model.encode_text(ids, True)
        theirs = 100 * (seen * read).sum(dim=1).clamp(min=0)
        assert theirs.min() > 1
        np.testing.assert_allclose(measure(images, captions), theirs, rtol=0, atol=1e-4)


def test_another_model_of_open_clip_is_refused_in_a_line(tmp_path: Path) -> None:
    open_clip_network(tmp_path, file="open_clip_model.safetensors", quick_gelu=False)
    config = tmp_path / "open_clip_config.json"
    stated, said = config.read_text(), "clip_weights .*: open_clip_config.json "
    for part, field, value, words in (
        ("vision_cfg", "timm_model_name", "vit", "has vision_cfg.timm_model_name: read are a plain ViT"),
        ("text_cfg", "hf_model_name", "roberta-base", "has text_cfg.hf_model_name"),
        ("vision_cfg", "layers", [3, 4, 6, 3], "has a ResNet"),
        ("text_cfg", "width", None, "is not whole"),
        ("preprocess_cfg", "resize_mode", "squash", "has preprocess_cfg.resize_mode"),
    ):
        changed = json.loads(stated)
        (changed | changed["model_cfg"])[part][field] = value
        config.write_text(json.dumps(changed))
        with one_line(FeatureNetworkError, match=said + words):
            ClipScore(str(tmp_path))
    config.unlink()
    with one_line(FeatureNetworkError, match="open_clip_config.json: no such file"):
        ClipScore(str(tmp_path))


def test_a_model_is_sampled_into_a_new_folder_and_measured(root: Path, tmp_path: Path) -> None:
    kind, network, settings = LONE["gan"]
    write(root / "gan", kind, network, settings)
    clip_network(root / "clip")
    (root / "words.txt").write_text("red heart\n" * 3)
    lite0 = ("--network", "efficientnet_lite0", "--model", "gan", "--count", "5")
    found = figures(root, "sampled", "real", *lite0, weights=())
    assert (found["samples"], found["model"], len([*(root / "sampled").glob("*.png")])) == (5, "gan", 5)
    again = figures(root, "again", "real", *lite0, weights=())
    assert again["figures"] == found["figures"]
    assert_refused(evaluated(root, "sampled", "real", *lite0, weights=()), "sampled holds files")
    for place in ("w.pth", "/proc/x"):
        assert_refused(evaluated(root, place, "real", *lite0, weights=()), f"{place}: ", "name a new folder")
    scored = ("--network", "efficientnet_lite0", "--captions", "words.txt", "--clip-weights")
    assert_refused(evaluated(root, "sampled", "real", *scored, "clip", weights=()), "3 captions for 5 images")
    assert_refused(evaluated(root, "new", "real", *scored, "none", "--model", "gan", weights=()), "clip_weights none")
    assert not (root / "new").exists()
    for text, fault in ((b"", "words.txt: the file is empty"), (b"c\xe9", "words.txt: 'utf-8' codec can't decode")):
        (root / "words.txt").write_bytes(text)
        assert_refused(evaluated(root, "sampled", "real", *scored, "clip", weights=()), fault)
    (root / "words.txt").write_bytes("red\u2028heart\u0085\r\n".encode() * 5)
    scores = figures(root, "sampled", "real", *scored, "clip", weights=())
    assert 0 <= scores["figures"]["clip_score_vit_32_8_16_5"] <= 100
    assert len(scores["sha256_of_clip_weights"]) == 64


LITE0 = ("--network", "efficientnet_lite0")


def commit_images(home: Path, *, holdout_fraction: float = 0.3) -> ShardIndex:
    """A set of 40 images of 8² as its stage commits it, with the key `i` and captions that the tiny cascade knows."""
    store, words = Store(str(home / "stages/images/i")), ("red apple", "green apple", "red flag")
    noise = lambda number, resolution: np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)  # noqa: E731
    with mock.patch.multiple(image_sets, CAPTIONS=words, image=noise):
        index = image_sets.write_set(store.join("files"), sizes=(20, 20), holdout_fraction=holdout_fraction)
    files = [describe(store.read(path), path) for path in (each.path for each in store.list())]
    commit_artifact(store, Artifact(kind="shards", stage="images", key="i", files=tuple(files)))
    return index


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a cascade whose base was trained on encoded images of a set."""
    home = tmp_path_factory.mktemp("trained")
    commit_images(home)
    commit_model(home, "precompute", "p", write(home / "gan", *LONE["gan"]), images="i")
    commit_model(home, "base", "b", home / "gan", contrastive="gone", images="p")
    commit_model(home, "cascade", "c", write_cascade(home), upsamplers="b,gone", base="b")
    return home


def own_figures(home: Path, *more: str, model: str = "stages/cascade/c") -> dict[str, Any]:
    done = finished("evaluate", "--model", model, "--json", "out.json", *LITE0, *more, cwd=home)
    return json.loads((home / "out.json").read_text()) | {"said": done.stdout}


def test_a_model_is_measured_by_the_images_held_out_of_its_own_set(trained: Path) -> None:
    """By the same figures as a folder of these images in the samples' size; without --images no sample stays."""
    found = own_figures(trained, "--count", "9", "--images", "kept")
    index = load_index(str(trained / "stages/images/i/files"))
    real = read_split(index, "holdout", View(16)).image
    write_folder(trained / "real", real)
    theirs = figures(trained, "kept", "real", *LITE0, weights=())
    assert (found["figures"], found["reference_samples"]) == (theirs["figures"], len(real))
    assert found["samples"] == len([*(trained / "kept").glob("*.png")]) == 9
    assert found["reference"] == f"numbers, held out in {index.root}"
    before = {*trained.rglob("*")}
    again = own_figures(trained, "--count", "9")
    assert (again["figures"], again["images"]) == (found["figures"], None)
    assert {*trained.rglob("*")} == before
    assert f"9 images against {len(real)} images of numbers, held out in" in " ".join(again["said"].split())


def test_own_words_are_asked_for_in_the_proportions_of_the_held_out_images(tmp_path: Path, trained: Path) -> None:
    """As often as each occurs where there are as many samples; they are what a CLIP score is of."""
    index, cascade = load_index(str(trained / "stages/images/i/files")), Cascade.load(trained / "cascade")
    real = read_split(index, "holdout", View(8))
    asked = requests_for(cascade, (), index, count=2 * len(real.key), seed=5)
    words = [*zip(real.label, real.caption, strict=True)]
    assert sorted((each.label, each.prompt) for each in asked) == sorted(words * 2)
    assert [each.seed for each in asked] == [*range(5, 5 + len(asked))]
    gan = Cascade.load(lone("gan", tmp_path / "gan"))
    labels = [each.label for each in requests_for(gan, (), index, count=len(real.key), seed=0)]
    assert sorted(labels) == sorted(real.label)
    clip_network(tmp_path / "clip")
    scored = ("--count", "7", "--clip-weights", str(tmp_path / "clip"))
    found = own_figures(trained, *scored, "--images", "scored")
    drawn = [each.prompt for each in requests_for(cascade, (), index, count=7, seed=2020)]
    (tmp_path / "words.txt").write_text("\n".join(drawn))
    same = ("--captions", str(tmp_path / "words.txt"), *scored[2:], *LITE0)
    theirs = figures(trained, "scored", "scored", *same, weights=())
    assert found["figures"]["clip_score_vit_32_8_16_7"] == theirs["figures"]["clip_score_vit_32_8_16_7"]
    (tmp_path / "words.txt").write_text("red flag")
    asked_for = own_figures(trained, *scored, *same[:2])
    assert (asked_for["samples"], asked_for["reference"]) == (7, found["reference"])
    assert asked_for["figures"]["clip_score_vit_32_8_16_7"] != found["figures"]["clip_score_vit_32_8_16_7"]


def test_a_registered_model_is_measured_by_the_images_of_the_artifact_that_it_was_registered_from(
    tmp_path: Path, trained: Path, empty_database: Path
) -> None:
    registry = Registry(tmp_path, empty_database)
    version = registry.register(trained / "cascade", key="c", base="b")
    named = f"models:/{NAME}@champion"
    asked = ("--count", "9", "--tracking", registry.uri)
    done = in_process("evaluate", "--model", named, *asked, *LITE0, cwd=tmp_path)
    assert_refused(done, "cascade/c: no set of images", "base/b is not in", "--reference")
    shutil.copytree(trained / "stages", tmp_path / "stages", dirs_exist_ok=True, ignore=lambda at, _: ["cascade"])
    found = own_figures(tmp_path, *asked, model=named)
    assert found["figures"] == own_figures(trained, "--count", "9")["figures"]
    assert found["model"] == f"models:/{NAME}/{version}"
    shutil.rmtree(tmp_path / "stages/cascade")
    done = in_process("evaluate", "--model", named, *asked, *LITE0, cwd=tmp_path)
    assert_refused(done, f"models:/{NAME}/{version} was registered from", "stages/cascade/c", "--reference")


def test_held_out_images_that_are_not_there_are_one_line_and_nothing_is_sampled(tmp_path: Path, trained: Path) -> None:
    def refused(model: str | Path, *words: str, more: tuple[str, ...] = ()) -> None:
        done = in_process("evaluate", "--model", str(model), "--images", "kept", *more, *LITE0, cwd=tmp_path)
        assert_refused(done, *words)
        assert not (tmp_path / "kept").exists()

    refused(trained / "cascade", "has no manifest", "--reference")
    commit_model(tmp_path, "cascade", "c", trained / "cascade", base="b")
    refused("stages/cascade/c", "no set of images", "base/b is not in", "--reference")
    commit_model(tmp_path, "base", "b", trained / "gan")
    refused("stages/cascade/c", "its inputs name none", "--reference")
    commit_model(tmp_path, "gan", "g", trained / "gan", images="i")
    commit_images(tmp_path, holdout_fraction=0)
    refused("stages/gan/g", "images/i holds out no images of numbers", "--reference")
    clip_network(tmp_path / "clip")
    commit_model(trained, "gan", "g", trained / "gan", images="i")
    scored = ("--clip-weights", "clip")
    refused(trained / "stages/gan/g", "a caption for each image", more=scored)
    done = in_process("evaluate", "--images", "kept", *LITE0, cwd=tmp_path)
    assert_refused(done, "--images and --reference, or a --model")
