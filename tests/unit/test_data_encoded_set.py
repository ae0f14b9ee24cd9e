"""Laws of what is made beforehand: the same samples in the same order, and what a training would make of them."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.data.decoded import ImageSamples
from components.data.encoding import Encode, Rows, SetEncoder, ShardJob, commit_set, part_names
from components.data.held_out import read_split
from components.data.listing import ShardError
from components.data.shards import BPE, ArrayInfo, ShardIndex, View, parse_arrays, read_bpe, write_array
from components.data.tars import iterate_shard
from components.runtime.storage.artifact import Artifact, describe, read_records
from components.runtime.storage.store import Store
from components.stages.precompute import PrecomputeConfig
from components.training.batches import to_batch, with_positions
from components.training.frozen import (
    ColumnEncoder,
    FrozenNetworks,
    check_maker,
    deviation_of_latents,
    encoded,
    frozen_encoders,
    frozen_networks,
    load_latents,
)
from tests.image_sets import number_of, read_rows, rewrite, write_set
from tests.tiny_cascade import commit_model, write_model
from tests.tiny_diffusion_branches import CONTRASTIVE
from tests.tiny_generators import LONE

RESOLUTION, SIZES = 16, (7, 1, 6, 12)
TEXT_COLUMNS = ("image_embedding", "text_states", "text_embedding")


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_set(Store(str(tmp_path / "set")), sizes=SIZES, resolution=RESOLUTION)


def encode(
    index: ShardIndex,
    folder: Path,
    load: Callable[[], Encode] | None = None,
    *,
    kept: int = RESOLUTION,
    made_by: dict[str, str] | None = None,
) -> ShardIndex:
    """The set as the stage's workers encode it, without any."""
    files = Store(str(folder))
    how: Any = {"kept_resolution": kept, "first": 0, "threads": 2, "precision": "fp32"}
    encoder = SetEncoder(index, load, files, resolution=RESOLUTION, **how)
    for number, (name, shard) in enumerate(zip(part_names(index), index.shards, strict=True)):
        encoder(ShardJob(number, name, shard)).finish()
    files.write(BPE, read_bpe(index).encode())
    records = read_records(files, part_names(index))
    return commit_set(index, records, files, kept_resolution=kept, made_by=made_by or {})


def stream(index: ShardIndex, *, resolution: int) -> dict[str, np.ndarray]:
    """Two epochs and more of what rank 1 of 2 reads."""
    view = View(resolution, arrays=tuple(index.array_names))
    return read_rows(ImageSamples(index, view), first=1, last=15, rank=1, world_size=2)


def brightness() -> Encode:
    """Two numbers of each image: its own number, and that of its label."""

    def encode(rows: Rows) -> Rows:
        return {"latents": np.stack([number_of(rows["image"]), rows["label"]], axis=1)}

    return encode


@pytest.mark.parametrize("size", [8, RESOLUTION])
def test_training_on_smaller_images_reads_what_it_would_have_made_of_the_large_ones(
    index: ShardIndex, tmp_path: Path, size: int
) -> None:
    small = encode(index, tmp_path / "small", kept=size)
    assert small.resolution == size
    expected, found = stream(index, resolution=8), stream(small, resolution=8)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    for split in ("train", "holdout"):
        one, other = (read_split(each, split, View(8)) for each in (index, small))
        assert one.key == other.key
        assert one.caption == other.caption
        np.testing.assert_array_equal(one.image, other.image)


def test_an_array_stays_with_its_sample_in_every_order(index: ShardIndex, tmp_path: Path) -> None:
    made = encode(index, tmp_path / "made", brightness, kept=8, made_by={"latents": "vae/k"})
    assert made.arrays == (ArrayInfo(name="latents", shape=(2,), made_by="vae/k"),)
    rows = stream(made, resolution=8)
    assert rows["latents"].dtype == np.float16
    np.testing.assert_array_equal(rows["latents"][:, 0], number_of(rows["image"]))
    np.testing.assert_array_equal(rows["latents"][:, 1], rows["label"])
    held_out = read_split(made, "holdout", View(8, arrays=("latents",)))
    np.testing.assert_array_equal(held_out.arrays["latents"][:, 0], number_of(held_out.image))
    assert held_out.key


def test_the_same_work_gives_the_same_bytes(index: ShardIndex, tmp_path: Path) -> None:
    one, other = (encode(index, tmp_path / name, brightness, made_by={"latents": "v"}) for name in ("one", "other"))
    assert one.shards == other.shards


def test_numpy_reads_what_is_written() -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5))
    stored = np.load(io.BytesIO(write_array(array)), allow_pickle=False)
    np.testing.assert_array_equal(stored, array.astype(np.float16))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "file",
    [
        saved(np.zeros((2, 3), np.float16)),  # another shape
        saved(np.zeros((3, 2), np.float32)),
        saved(np.zeros((3, 2), ">f2")),
        saved(np.array([{"x": 1}] * 6, dtype=object)),  # a pickle
        write_array(np.zeros((3, 2)))[:-1],
        write_array(np.zeros((3, 2))) + b"\0",
        b"",
    ],
)
def test_a_file_that_is_not_what_the_index_says_is_refused_naming_the_sample(file: bytes) -> None:
    good = write_array(np.ones((3, 2)))
    with pytest.raises(ShardError, match=r"here: that of sample b is not float16 of shape \(3, 2\)"):
        parse_arrays([("a", good), ("b", file)], ArrayInfo(name="x", shape=(3, 2), made_by="x"), "here")


def test_a_sample_without_its_array_is_named(index: ShardIndex, tmp_path: Path) -> None:
    made = encode(index, tmp_path / "made", brightness, made_by={"latents": "v"})
    entry, store = made.shards[2], Store(str(tmp_path / "made"))
    groups = list(iterate_shard(store.read(entry.url), entry.url))
    del groups[1].members["latents.npy"]
    damaged = made.model_copy(update={"shards": (rewrite(store, entry, groups),)})
    with pytest.raises(ShardError, match=rf"shard-000002\.tar, sample {groups[1].key}: no latents\.npy"):
        read_split(damaged, "train", View(8, arrays=("latents",)))
    assert read_split(damaged, "train", View(8)).key  # who asks for no array needs none


@pytest.fixture
def contrastive(index: ShardIndex, tmp_path: Path) -> Artifact:
    text = CONTRASTIVE["text"] | {"vocab_size": index.text.vocab_size, "context_length": index.text.text_length}
    folder = write_model(tmp_path / "contrastive", "contrastive", CONTRASTIVE | {"text": text}, {"resolution": 8})
    (folder / BPE).write_text(read_bpe(index))
    return commit_model(tmp_path, "contrastive", "c", folder)


def images_of(index: ShardIndex) -> Artifact:
    store = Store(index.root)
    entries = tuple(describe(store.read(file.path), file.path) for file in store.list())
    return Artifact(kind="shards", stage="images", key="images", files=entries, root=store.uri)


def test_a_training_gets_of_the_set_what_its_encoders_would_have_made(
    index: ShardIndex, contrastive: Artifact, tmp_path: Path
) -> None:
    networks, how = FrozenNetworks(contrastive=contrastive), {"resolution": RESOLUTION, "bpe": read_bpe(index)}
    load = partial(ColumnEncoder, frozen_encoders(TEXT_COLUMNS, networks, **how).load_encoders, TEXT_COLUMNS)
    made = encode(index, tmp_path / "made", load, made_by=dict.fromkeys(TEXT_COLUMNS, contrastive.identity))
    batches, sizes = [], []
    for each in (index, made):
        frozen, given = frozen_networks(TEXT_COLUMNS, images_of(each), each, networks, resolution=RESOLUTION)
        assert [*given] == each.array_names
        rows = read_split(each, "train", View(RESOLUTION, arrays=given))
        columns = {"image": rows.image, "label": rows.label, "text": rows.text, **rows.arrays}
        encoders = [load(torch.device("cpu")) for load in frozen.load_encoders]
        batches.append(encoded(with_positions(to_batch(columns)), encoders))
        sizes.append(frozen.sizes)
    live, read = batches
    assert sizes[0] == sizes[1]
    for name in (*TEXT_COLUMNS, "null_text_states", "null_text_embedding"):
        torch.testing.assert_close(read[name], live[name], rtol=2e-3, atol=2e-3)
    assert live["text_states"].std() > 0.1  # not equal for being nothing


def test_latents_of_the_set_are_the_autoencoder_s_and_no_image_is_needed_for_them(index: ShardIndex, tmp_path: Path):
    vae = commit_model(tmp_path, "vae", "v", write_model(tmp_path / "vae", *LONE["vae"]))
    made_of = frozen_encoders(["latents"], FrozenNetworks(vae), resolution=RESOLUTION, bpe=read_bpe(index))
    load = partial(ColumnEncoder, made_of.load_encoders, ["latents"])
    made = encode(index, tmp_path / "made", load, kept=2, made_by={"latents": vae.identity})
    latents = load_latents(torch.device("cpu"), autoencoder=vae, scale=3.0)
    large = read_split(index, "train", View(RESOLUTION))
    small = read_split(made, "train", View(2, arrays=("latents",)))
    live = latents(to_batch({"image": large.image}))["image"]
    read = latents(to_batch({"image": small.image, **small.arrays}))["image"]
    torch.testing.assert_close(read, live, rtol=2e-3, atol=2e-3)
    one, other = (deviation_of_latents(each, vae, samples=16) for each in (index, made))
    assert one == pytest.approx(other, rel=2e-3)


def test_arrays_of_another_model_are_refused(index: ShardIndex, contrastive: Artifact, tmp_path: Path) -> None:
    made = encode(index, tmp_path / "made", brightness, made_by={"latents": "vae/other"})
    with pytest.raises(ValueError, match=r"latents of the set are by vae/other, not by contrastive/c: precompute them"):
        check_maker(made, "latents", contrastive)
    with pytest.raises(ValueError, match="not by None"):
        check_maker(made, "latents", None)


def test_a_column_without_its_encoder_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="latents among the columns need an autoencoder"):
        frozen_encoders(["latents"], FrozenNetworks(), resolution=RESOLUTION, bpe="")
    with pytest.raises(ValueError, match="columns name one twice"):
        PrecomputeConfig(columns=("latents", "latents"), resolution=RESOLUTION)
