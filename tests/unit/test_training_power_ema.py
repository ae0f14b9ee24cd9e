"""Laws of a training with averages by a power of time, without Ray."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.configuration.usage import UsageError
from components.models.bundle import load_bundle
from components.runtime.storage.store import DamagedFileError, Store
from components.sampling.model import BPE
from components.training.batches import to_batch
from components.training.checkpoint import copy_to_host
from components.training.learner import below
from components.training.loop import Task, fit
from components.training.optim import EMAProfile
from components.training.results import (
    SNAPSHOTS,
    ModelDescription,
    choose_average,
    fetch_snapshots,
    join_snapshots,
    kept_profiles,
    write_averaged,
    write_model,
    write_snapshots,
)
from components.training.rows import send_rows
from pipelines.command.upkeep import write_average
from tests.checkpoints import weights_in, write_checkpoint
from tests.refusals import one_line
from tests.tiny_training import DATASET_INFO, GRID, assert_equal_bits, batches, make_task, prior_config, weights_of

CHANGES = {"ema": "power", "ema_sigma_rel": 0.07}


def trained(folder: Path) -> Task:
    """A finished run and what it leaves: snapshots of steps 10 and 20, a final state."""
    config = prior_config(**CHANGES)
    task = make_task(config)

    def save(step: int, task: Task) -> None:
        state = task.state_dict()
        write_checkpoint(folder / str(step), state, step=step)
        copy = copy_to_host(state, step=step)
        write_snapshots(folder / SNAPSHOTS, copy, sigma_rel=config.optimization.ema_sigma_rel)

    fit(task, batches(config, to_batch), config.optimization, save=save)
    return task


def test_snapshots_hold_both_averages_of_each_checkpoint(tmp_path: Path) -> None:
    weights = weights_of(trained(tmp_path))
    kept = kept_profiles(tmp_path / SNAPSHOTS)
    assert [*kept] == [EMAProfile(10, 0.05), EMAProfile(10, 0.10), EMAProfile(20, 0.05), EMAProfile(20, 0.10)]
    assert_equal_bits(load_file(kept[EMAProfile(20, 0.05)]), below("ema.", weights))  # 0.05 is nearest to 0.07
    assert_equal_bits(load_file(kept[EMAProfile(20, 0.10)]), below("second_ema.", weights))


def test_snapshots_come_back_as_they_were_sent_or_not_at_all(tmp_path: Path) -> None:
    trained(tmp_path)
    run, folder = Store(str(tmp_path / "run")), tmp_path / SNAPSHOTS
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    send_rows(folder, run.join(SNAPSHOTS))
    fetch_snapshots(run, tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == sent
    files = [info.path for info in run.list()]
    assert len(files) == 2 * len(sent)  # each has its record
    for path in files:
        whole = run.read(path)
        run.write(path, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(DamagedFileError, match=r"snapshots/.*train anew with --force"):
            fetch_snapshots(run, tmp_path / "other")
        run.write(path, whole)
    run.delete(next(path for path in files if path.endswith(".safetensors")))
    with pytest.raises(DamagedFileError, match=r"snapshots/.*train anew with --force"):
        fetch_snapshots(run, tmp_path / "other")


def model_of(folder: Path) -> Path:
    """The final state of `trained` as the folder that a stage commits."""
    trained(folder / "run")
    model = folder / "model"
    model.mkdir()
    (folder / "run" / SNAPSHOTS).rename(model / SNAPSHOTS)
    description = ModelDescription("transformer", prior_config().network_arguments(DATASET_INFO, GRID), settings={})
    summary = {"steps": 20.0, "ema_sigma_rel": 0.07}
    write_averaged(model, description, weights_in(folder / "run" / "20"))
    write_model(model, description, summary=summary, previews={})
    return model


def test_a_model_can_be_given_another_average_without_training_again(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    kept = kept_profiles(model / SNAPSHOTS)
    narrow, wide = load_file(kept[EMAProfile(20, 0.05)]), load_file(kept[EMAProfile(20, 0.10)])
    between = load_bundle(model).module.state_dict()
    name = next(name for name, tensor in narrow.items() if not torch.equal(tensor, wide[name]))
    assert not torch.equal(between[name], narrow[name])
    assert not torch.equal(between[name], wide[name])
    choose_average(model, tmp_path / "other", sigma_rel=0.10)
    other = load_bundle(tmp_path / "other").module.state_dict()
    for name, tensor in wide.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_command_writes_the_model_of_any_length_with_its_tokenizer(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / BPE).write_text("{}")
    written = tmp_path / "longer"
    registered = write_average(str(model), length=0.15, tracking=None, out=written)
    assert registered is None  # as little as the model that it was made of
    join_snapshots(model / SNAPSHOTS, 0.15, tmp_path / "expected.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    assert_equal_bits(load_bundle(written).module.state_dict(), expected)
    assert (written / BPE).read_text() == "{}"
    kept = kept_profiles(model / SNAPSHOTS)
    assert not any(
        torch.equal(expected[name], tensor)
        for path in kept.values()
        for name, tensor in load_file(path).items()
        if tensor.is_floating_point()
    )


@pytest.mark.parametrize(
    ("length", "words"), [(0.3, r"in \(0, 0.28\), not 0.3"), (0.1, "ema: power"), (0.2, "new folder")]
)
def test_what_the_command_cannot_do_is_one_line(length: float, words: str, tmp_path: Path) -> None:
    model, out = model_of(tmp_path), tmp_path / "other"
    if length == 0.1:
        (model / SNAPSHOTS).rename(tmp_path / "elsewhere")
    if length == 0.2:
        out.mkdir()
        (out / "file").write_text("")
    with one_line(UsageError, match=words) as caught:
        write_average(str(model), length=length, tracking=None, out=out)
    assert str(out if length == 0.2 else model) in str(caught.value)
