"""Laws of the one policy of precision: what each word means on each device, in training and in sampling."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from components.configuration.optimization import OptimizationConfig, Precision, Training
from components.configuration.sampling import DiffusionBranchSampling
from components.models.devices import products, state_products
from components.runtime.execution import Resources
from components.runtime.pool import PoolWorker
from components.sampling import device as devices
from components.sampling.cascade import DESCRIPTION, Cascade
from components.sampling.device import computes_bf16, sampling_in
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.learner import Learner
from components.training.loop import fit
from components.training.parallel import Worker
from components.training.worker import Saver, TrainingJob, differences
from pipelines.recipes.published import PAPER_RECIPES
from tests.pretend_gpu import GPU, pretend_gpu
from tests.tiny_cascade import write_cascade
from tests.tiny_generators import LONE, PRIORS, lone, token_branch
from tests.tiny_training import KINDS, batches, config_of, make_task, rows_at

CPU = torch.device("cpu")
TF32_OFF, TF32_ON = (False, False), (True, True)


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Puts back what a test states for its process."""
    before = stated()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def stated() -> tuple[bool, bool]:
    """Whether matrices and convolutions may take TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def bf16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU multiplies bf16, and trains and samples as a GPU does."""
    with_bf16(monkeypatch, CPU, GPU)


@pytest.mark.parametrize("word", get_args(Precision))
@pytest.mark.parametrize("there", [True, False])
def test_bf16_is_computed_where_the_device_has_it_and_never_on_a_cpu(
    word: Precision, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "native_bf16", lambda device: there)
    asked = word == "bf16"
    assert [computes_bf16(word, device) for device in (CPU, GPU)] == [False, asked and there]


@pytest.mark.parametrize("word", get_args(Precision))
def test_matrices_and_convolutions_take_tf32_alike_and_where_it_is_said_alone(word: Precision) -> None:
    state_products("fp32")
    with products(word):
        assert stated() == (TF32_ON if word == "tf32" else TF32_OFF)
    assert stated() == TF32_OFF
    state_products("tf32")
    with pytest.raises(KeyError), products("fp32"):
        raise KeyError
    assert stated() == TF32_ON


def test_workers_of_a_pool_leave_nothing_to_the_defaults_of_torch() -> None:
    torch.backends.cudnn.allow_tf32 = True
    PoolWorker(Resources(threads=torch.get_num_threads()))
    assert stated() == TF32_OFF


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("cascade"))


def test_on_a_cpu_an_image_is_the_same_to_the_bit_whatever_the_precision(folder: Path) -> None:
    asked = [Request(label=1, seed=seed, generator=name) for seed in range(2) for name in ("diffusion", "tokens")]
    loaded = Cascade.load(folder)
    images = [loaded.sample(asked), replace(loaded, precision="fp32").sample(asked)]
    assert all(np.array_equal(one, other) for one, other in zip(*images, strict=True))


def test_tf32_is_off_while_a_cascade_samples(folder: Path) -> None:
    state_products("tf32")
    seen = []
    Cascade.load(folder).sample([Request(label=1, generator="tokens")], between=lambda: seen.append(stated()))
    assert set(seen[1:]) == {TF32_OFF}, "the first is before its batch"
    assert stated() == TF32_ON


def test_a_cascade_says_in_what_it_samples_and_one_of_an_older_version_meant_fp32(folder: Path, tmp_path: Path) -> None:
    assert DiffusionBranchSampling().precision == Cascade.load(folder).precision == "bf16"
    assert "precision" not in DiffusionBranchSampling().by_model()
    said = json.loads((folder / DESCRIPTION).read_text())
    del said["precision"]
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / DESCRIPTION).unlink()
    (tmp_path / DESCRIPTION).write_text(json.dumps(said))
    assert Cascade.load(tmp_path).precision == "fp32"


@pytest.mark.parametrize("name", ["diffusion", *LONE, *PRIORS])
def test_every_generator_samples_in_bf16_whoever_else_is_in_the_batch(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs do by default, here on a CPU: images are of bf16, and near those of fp32 where nothing is drawn."""
    place = folder
    if name != "diffusion":
        place = lone(name, tmp_path) if name in LONE else token_branch(PRIORS[name], tmp_path)
    cascade, kind = Cascade.load(place), "tokens" if name in PRIORS else name
    asked = [Request(label=None if name == "vae" else 1, seed=seed, generator=kind) for seed in range(3)]
    exact = np.stack(cascade.sample(asked)).astype(int)
    bf16_everywhere(monkeypatch)
    rounded = np.stack(cascade.sample(asked)).astype(int)
    alone = np.stack(cascade.sample(asked, batch_size=1)).astype(int)
    assert (rounded != exact).any() or name == "pixels", "whose logits, fp32, few roundings before reach"
    if name in ("diffusion", "gan", "vae"):
        assert np.abs(rounded - exact).mean() < 4
        assert np.abs(rounded - alone).mean() < 4


def test_autocast_ends_with_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16_everywhere(monkeypatch)
    one = torch.ones(2, 2)
    with sampling_in("bf16", CPU):
        assert (one @ one).dtype == torch.bfloat16
    assert (one @ one).dtype == torch.float32


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_published_recipes_train_and_sample_in_bf16(name: str) -> None:
    found = [part.optimization for part in trainings(PAPER_RECIPES[name]())]
    assert found
    assert {part.precision for part in found} == {"bf16"}


def trainings(value: object) -> Iterator[Training]:
    """All that a recipe trains."""
    if isinstance(value, Training) and isinstance(value.optimization, OptimizationConfig):
        yield value
    parts = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    for part in parts:
        yield from trainings(part)


def with_bf16(monkeypatch: pytest.MonkeyPatch, *those: torch.device) -> None:
    """Only these devices have bf16 of their own, and all that have it compute in it."""
    monkeypatch.setattr(devices, "native_bf16", lambda device: device in those)
    monkeypatch.setattr(devices, "IN_FP32", ())


def losses(kind: str, precision: str) -> list[float]:
    config, found = config_of(kind, precision=precision, total_steps=5), []
    fit(
        make_task(config),
        batches(config, to_batch),
        config.optimization,
        log=lambda step, metrics: found.append(metrics["loss"].item()),
    )
    return found


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_without_bf16_of_its_own_a_device_trains_as_in_fp32_bit_for_bit(kind: str, monkeypatch: pytest.MonkeyPatch):
    with_bf16(monkeypatch)
    assert losses(kind, "bf16") == losses(kind, "fp32")


def test_with_bf16_of_its_own_a_device_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bf16(monkeypatch, CPU)
    rounded, exact = losses("base", "bf16"), losses("base", "fp32")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_held_out_figures_are_measured_in_fp32_and_without_tf32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family: what compares models has no rounding of a recipe's own."""
    with_bf16(monkeypatch, CPU)
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", mock.Mock())
    seen, written = [], mock.Mock()
    monkeypatch.setattr("components.training.worker.finish", written)
    for precision in ("fp32", "bf16"):
        config = config_of(kind, precision=precision)
        task, saver = make_task(config), mock.Mock(has_snapshots=False, held_out=rows_at(config, range(4)))
        saver.worker.rank, saver.reporter.summary.return_value = 0, {}
        hook = register_module_forward_hook(lambda *_: seen.append(stated()))
        with products("tf32"):
            Saver.finish(saver, task)
        hook.remove()
    fp32, bf16 = (call.kwargs["summary"] for call in written.call_args_list)
    assert fp32 == bf16 != {}
    assert set(seen) == {TF32_OFF}


@pytest.mark.parametrize("there", [True, False])
def test_the_device_that_trains_is_the_one_that_is_asked(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bf16 is no reason for bf16 on a GPU without it, and the other way round."""
    with_bf16(monkeypatch, GPU if there else CPU)
    config = config_of("base", precision="bf16").optimization
    with pretend_gpu(), Learner(torch.nn.Linear(2, 2), config=config, worker=Worker(device=GPU)).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if there else torch.float32)


def lines(precision: str, device: torch.device = GPU, **share: Any) -> list[str]:
    config = config_of("base", precision=precision).optimization
    job: dict[str, Any] = dict.fromkeys(TrainingJob._fields) | {"config": config, "resources": Resources(**share)}
    return list(differences(cast(TrainingJob, TrainingJob(**job)), Worker(device=device)))


def test_one_line_says_that_fp32_takes_the_place_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bf16(monkeypatch)
    assert lines("bf16") == [f"{GPU} has no bf16 of its own: training in fp32"]
    assert lines("fp32") == lines("bf16", CPU) == []
    with_bf16(monkeypatch, GPU)
    assert lines("bf16") == []


def test_one_line_says_that_one_worker_has_nothing_to_shard_with() -> None:
    assert lines("fp32", sharding="full") == ["sharding full needs several workers: the only one holds all"]
