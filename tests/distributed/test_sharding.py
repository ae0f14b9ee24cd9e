"""Networks in shards train as whole ones, whatever the number of ranks: real gloo processes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from components.models.bundle import DESCRIPTION, WEIGHTS, load_bundle
from components.models.layers import rounded_maps
from components.runtime.storage.store import Store
from components.training import sharding
from components.training.batches import to_batch
from components.training.checkpoint import STATE, copy_to_host, part_file, read_checkpoint, refuse_non_finite
from components.training.learner import below
from components.training.loop import Task
from components.training.memory import KEPT, with_room
from components.training.optim import NonFiniteError
from components.training.parallel import ALONE, Worker, is_cut, local
from components.training.reporting import Reporter
from components.training.results import METRICS, ROWS, SNAPSHOTS, ModelDescription, finish, write_snapshots
from components.training.rows import send_rows
from tests import trained_networks
from tests.checkpoints import read_folder, weights_in, write_checkpoint
from tests.distributed.gloo import run_ranks
from tests.distributed.recording import FileRecorder
from tests.limited_memory import limit_memory, limit_memory_of_backward
from tests.tiny_text_image import TEXT_IMAGE
from tests.tiny_training import (
    DATASET_INFO,
    GRID,
    assert_close,
    assert_equal_bits,
    batches,
    rows_at,
)

STEPS, MORE, ROOM = 2, 3, 2
KINDS = ("prior", "masked_prior", "base", "hybrid", "upsampler", "dit", "adapter", "image_to_image", *TEXT_IMAGE)
MORE_RANKS = ("prior", "base", "contrastive")  # of which four ranks train one too
RESUMED = ("base", "contrastive")  # weights of four dimensions, and one of none
# Kinds of which the finished model is written, one with snapshots, one merged with its adapter.
FINISHED_KINDS = {"base": "unet", "dit": "dit", "adapter": "transformer"}
CASES = [*((kind, 2) for kind in KINDS), *((kind, 4) for kind in MORE_RANKS)]
ADAPTER: dict[str, Any] = {"kind": "lora", "rank": 3, "alpha": 6}  # three rows, of which two ranks have two and one
CHANGES: dict[str, dict[str, Any]] = {
    "base": {"ema": "power", "optimizer": "muon"},  # two averages; whole matrices are gathered
    "dit": {"ema_decay": 0.0},  # none
    "upsampler": {"gradient_checkpointing": True},
    "adapter": {"init_from": {"uri": "drawn"}, "adapter": ADAPTER},
}


def made(kind: str, worker: Worker = ALONE, **changes: Any) -> tuple[Any, Task]:
    numbers = {"total_steps": MORE, "warmup_steps": 2, **CHANGES.get(kind, {}), **changes}
    return trained_networks.made("prior" if kind == "adapter" else kind, worker=worker, **numbers)


def train(task: Task, config: Any, worker: Worker, *, start: int = 0, stop: int = STEPS) -> Task:
    """The steps after `start` up to `stop`."""
    stream = batches(config, to_batch, start_step=start, worker=worker)
    for step in range(start + 1, stop + 1):
        task.train_step(next(stream), step)
    return task


def keep(task: Task, folder: Path, worker: Worker, *, step: int) -> None:
    """Write a checkpoint, each rank its part."""
    write_checkpoint(folder, task.state_dict(), step=step, worker=worker)
    dist.barrier()


def train_rank(worker: Worker, folder: Path) -> None:
    worker = worker._replace(shards=True)
    if worker.world_size == 4:
        for kind in MORE_RANKS:
            copies = worker._replace(replicas=2)
            config, task = made(kind, copies)
            task.max_batch = 2 if kind == "base" else None  # some in parts
            keep(train(task, config, copies), folder / f"{kind}-copies", copies, step=STEPS)
            if kind in FINISHED_KINDS:
                finished(kind, task, folder / f"{kind}-copies-finished", copies)
            if kind in RESUMED:
                resumed = made(kind, copies)[1]
                resumed.load_state_dict(read_folder(folder / f"{kind}-copies")[1])
                (folder / f"again-{worker.rank}").write_text(str(differing(task, resumed)))
    for kind in KINDS if worker.world_size == 2 else MORE_RANKS:
        config, task = made(kind, worker)
        keep(train(task, config, worker), folder / f"{kind}-{worker.world_size}", worker, step=STEPS)
        if kind in FINISHED_KINDS:
            finished(kind, task, folder / f"{kind}-{worker.world_size}-finished", worker)
    if worker.world_size == 2:
        for kind in MORE_RANKS:
            config, task = made(kind, worker)
            task.max_batch = 3
            keep(train(task, config, worker), folder / f"{kind}-parts", worker, step=STEPS)
        found: dict[str, Any] = {"read": {kind: resume(kind, folder, worker) for kind in RESUMED}}
        try_memory(folder, worker)
        found["in_bf16"] = {kind: gathered_in_bf16(kind, worker) for kind in KINDS}
        found |= {"held": held(worker), "bad": bad_step(worker), "refused": refused(worker), "judged": judged(worker)}
        (folder / f"found-{worker.rank}.json").write_text(json.dumps(found))


def resume(kind: str, folder: Path, worker: Worker) -> list[str]:
    """Go on from checkpoints of four ranks and of two, and without a stop. Returns the files read of the first."""
    read: dict[str, list[str]] = {"from_four": [], "from_two": []}
    for name, ranks in (("from_four", 4), ("from_two", 2)):

        def fetch(file: str, name: str = name, ranks: int = ranks) -> Path:
            read[name].append(file)
            return folder / f"{kind}-{ranks}" / file

        config, task = made(kind, worker)
        task.load_state_dict(read_checkpoint(fetch)[1])
        train(task, config, worker, start=STEPS, stop=MORE)
        keep(task, folder / f"{kind}-{name}", worker, step=MORE)
    config, task = made(kind, worker)
    keep(train(task, config, worker, stop=MORE), folder / f"{kind}-undisturbed", worker, step=MORE)
    return read["from_four"]


def finished(kind: str, task: Task, folder: Path, worker: Worker) -> None:
    """Keep a snapshot and write the finished model, as a training does at its last step."""
    run, config = Store(str(folder / "run")), made(kind)[0]
    network = config.network_arguments(DATASET_INFO, GRID if kind == "adapter" else None)
    state, summary = task.state_dict(), dict[str, float]()
    if kind == "base":
        summary["ema_sigma_rel"] = 0.05
        place = folder / f"sent-{worker.rank}"
        place.mkdir(parents=True)
        if worker.rank < worker.parts:
            write_snapshots(place, copy_to_host(state, step=STEPS, worker=worker), sigma_rel=0.05)
        send_rows(place, run.join(SNAPSHOTS), parts=worker.parts)
    adapter = config.adapter if kind == "adapter" else None
    description = ModelDescription(FINISHED_KINDS[kind], network, {}, adapter=adapter)
    model = {"weights": state["weights"], "summary": summary, "previews": {}}
    finish(run, Store(str(folder / "model")), description, worker=worker, **model)
    dist.barrier()


def try_memory(folder: Path, worker: Worker) -> None:
    """Rank 1 alone has no room for more than ROOM samples, forward or backward; then the same told so."""
    for where, limit in (("forward", limit_memory), ("backward", limit_memory_of_backward), ("told", None)):
        config, task = made("base", worker)
        stream = batches(config, to_batch, worker=worker)
        if limit is None:
            task.max_batch = ROOM
        else:
            if worker.rank == 1:
                limit(task, ROOM)
            recorder = FileRecorder(folder / f"log-{worker.rank}.jsonl")
            reporter = Reporter(config.optimization, stage="base", worker=worker, recorder=recorder, start_step=0)
            stream = with_room(task, stream, reporter, Store(str(folder / where)))
        for step in range(1, STEPS + 1):
            task.train_step(next(stream), step)
        keep(task, folder / f"memory-{where}", worker, step=STEPS)


def gathered_in_bf16(kind: str, worker: Worker) -> dict[str, Any]:
    """Train under autocast and evaluate, with weights gathered as they are, then as autocast rounds them.
    Returns the bytes sent by dtype in each training, and the names of weights and figures that differ."""
    sent: list[Counter[str]] = []
    ends: list[dict[str, Tensor]] = []
    gather = DefaultAllGather.__call__

    def counted(self: Any, whole: Tensor, part: Tensor, *args: Any) -> Any:
        sent[-1][str(part.dtype)] += part.nbytes
        return gather(self, whole, part, *args)

    for maps in (lambda module: set(), rounded_maps):
        sent.append(Counter())
        with mock.patch.object(sharding, "rounded_maps", maps):
            config, task = made(kind, worker)
        cast(Any, task).learner.computes_bf16 = True
        with mock.patch.object(DefaultAllGather, "__call__", counted):
            train(task, config, worker)
        figures = task.evaluate(rows_at(config, range(1000, 1004)))
        ends.append(shards_of(task) | {name: torch.tensor(figure) for name, figure in figures.items()})
    return {"sent": sent, "differ": [name for name, end in ends[0].items() if not torch.equal(end, ends[1][name])]}


def held(worker: Worker) -> dict[str, float]:
    """What this rank holds of all numbers of each kind, between two steps; all of them is 1."""
    config, task = made("dit", worker, ema_decay=0.9)
    learner = cast(Any, task).learner
    train(task, config, worker, stop=1)
    learner.backward(cast(Any, task).part_losses(next(batches(config, to_batch, worker=worker)))["loss"])
    parameters = [*learner.network.parameters()]
    moments = [value for state in learner.optimizer.state.values() for value in (state["exp_avg"], state["exp_avg_sq"])]
    kinds = {
        "weights": parameters,
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "optimizer": moments,
        "averages": [*learner.ema.network.parameters()],
    }
    total = sum(parameter.numel() for parameter in parameters)
    return {name: sum(local(tensor).numel() for tensor in tensors) / total for name, tensors in kinds.items()}


def bad_step(worker: Worker) -> dict[str, Any]:
    """What a step moves whose loss is not finite on rank 1 alone, and how many are counted."""
    config, task = made("base", worker)
    train(task, config, worker, stop=1)
    before, stream = shards_of(task), batches(config, to_batch, worker=worker)
    batch = next(stream)
    if worker.rank == 1:
        batch["image"] = batch["image"] * float("nan")
    task.train_step(batch, 2)
    moved = [name for name, tensor in shards_of(task).items() if not torch.equal(tensor, before[name])]
    return {"moved": moved, "counted": task.state_dict()["learner"]["non_finite"]}


def differing(task: Task, other: Task) -> list[str]:
    own = shards_of(other)
    return [name for name, tensor in shards_of(task).items() if not torch.equal(tensor, own[name])]


def shards_of(task: Task) -> dict[str, Tensor]:
    return {name: local(tensor.detach()).clone() for name, tensor in task.state_dict()["weights"].items()}


def refused(worker: Worker) -> str:
    """What this rank says to a checkpoint of weights that are not finite on rank 1 alone."""
    _, task = made("dit", worker)
    weights = task.state_dict()["weights"]
    name = next(name for name, tensor in weights.items() if is_cut(tensor))
    if worker.rank == 1:
        local(weights[name]).fill_(float("nan"))
    try:
        refuse_non_finite(weights, step=7, worker=worker)
    except NonFiniteError as error:
        return str(error)
    return ""


def judged(worker: Worker) -> dict[str, float]:
    config, task = made("base", worker)
    train(task, config, worker)
    shown = task.preview(rows_at(config, range(1000, 1004)), STEPS)
    return task.evaluate(rows_at(config, range(1000, 1008))) | {"png": len(shown["samples"])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for ranks in (4, 2):
        run_ranks(ranks, train_rank, folder)
    return folder


def alone(kind: str, folder: Path, *, stop: int = STEPS) -> dict[str, Tensor]:
    """What one process comes to that holds all."""
    torch.set_num_threads(1)
    config, task = made(kind)
    write_checkpoint(folder / "alone", train(task, config, ALONE, stop=stop).state_dict(), step=stop)
    return weights_in(folder / "alone")


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_shards_on_two_and_four_ranks_train_as_one_whole(kind: str, ranks: int, trained: Path, tmp_path: Path) -> None:
    whole, found = alone(kind, tmp_path), weights_in(trained / f"{kind}-{ranks}")
    assert found.keys() == whole.keys()
    assert_close(found, whole)


@pytest.mark.parametrize("kind", MORE_RANKS)
def test_two_copies_in_shards_train_as_one_whole_and_one_is_written(kind: str, trained: Path, tmp_path: Path) -> None:
    assert_close(weights_in(trained / f"{kind}-copies"), alone(kind, tmp_path))
    written = (trained / f"{kind}-copies").glob("*.safetensors")
    assert sorted(path.name for path in written) == [part_file(0, 2), part_file(1, 2)]


def test_each_rank_of_two_copies_reads_its_part(trained: Path) -> None:
    assert [(trained / f"again-{rank}").read_text() for rank in range(4)] == ["[]"] * 4


@pytest.mark.parametrize("kind", MORE_RANKS)
def test_shards_that_take_a_batch_in_parts_train_as_those_that_do_not(kind: str, trained: Path) -> None:
    assert_close(weights_in(trained / f"{kind}-parts"), weights_in(trained / f"{kind}-2"))


@pytest.mark.parametrize("kind", RESUMED)
def test_shards_that_are_read_again_go_on_with_the_same_bits(kind: str, trained: Path) -> None:
    assert_equal_bits(weights_in(trained / f"{kind}-from_two"), weights_in(trained / f"{kind}-undisturbed"))


@pytest.mark.parametrize("kind", RESUMED)
def test_another_number_of_ranks_and_one_that_holds_all_go_on_from_shards(kind: str, trained: Path, tmp_path: Path):
    whole = alone(kind, tmp_path, stop=MORE)
    assert_close(weights_in(trained / f"{kind}-from_four"), whole)
    config, task = made(kind)
    task.load_state_dict(read_folder(trained / f"{kind}-4")[1])
    write_checkpoint(tmp_path / "one", train(task, config, ALONE, start=STEPS, stop=MORE).state_dict(), step=MORE)
    assert_close(weights_in(tmp_path / "one"), whole)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_rank_writes_its_part_and_reads_those_with_its_rows(kind: str, trained: Path) -> None:
    """Once each; the first part holds what is not cut."""
    sizes = [(trained / f"{kind}-4" / part_file(part, 4)).stat().st_size for part in range(4)]
    assert max(sizes) < 0.35 * sum(sizes)  # headers, and counts of the optimizer
    assert sorted(found_by(0, trained)["read"][kind]) == [part_file(0, 4), part_file(1, 4), STATE]
    second = found_by(1, trained)["read"][kind]
    assert len(second) == len({*second})
    assert {*second} >= {part_file(0, 4), part_file(2, 4), part_file(3, 4), STATE}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_autocast_rounds_are_gathered_in_bf16_and_change_no_bit(kind: str, trained: Path) -> None:
    for rank in (0, 1):
        found = found_by(rank, trained)["in_bf16"][kind]
        whole, short = found["sent"]
        assert found["differ"] == []
        assert whole.keys() == {"torch.float32"}
        assert whole["torch.float32"] == short["torch.float32"] + 2 * short["torch.bfloat16"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_tries_its_memory_alone_leaves_all_shards_as_they_were(where: str, trained: Path) -> None:
    assert json.loads((trained / where / KEPT).read_text()) == {"max_batch_per_device": ROOM}
    assert_equal_bits(weights_in(trained / f"memory-{where}"), weights_in(trained / "memory-told"))


def found_by(rank: int, trained: Path) -> dict[str, Any]:
    return json.loads((trained / f"found-{rank}.json").read_text())


def test_each_of_two_ranks_holds_half_of_weights_gradients_moments_and_averages(trained: Path) -> None:
    """Also: every parameter has a gradient. FSDP2 gives none to those that `backward(inputs=…)` names."""
    for rank in (0, 1):
        shares = found_by(rank, trained)["held"]
        assert shares == pytest.approx({"weights": 0.5, "gradients": 0.5, "optimizer": 1.0, "averages": 0.5}, abs=0.02)


def test_a_step_that_is_not_finite_on_one_rank_is_taken_on_none(trained: Path) -> None:
    assert [found_by(rank, trained)["bad"] for rank in (0, 1)] == [{"moved": [], "counted": 1}] * 2


def test_all_ranks_refuse_a_checkpoint_of_which_one_holds_what_is_not_finite(trained: Path) -> None:
    said = {found_by(rank, trained)["refused"] for rank in (0, 1)}
    assert len(said) == 1
    assert "is not finite at step 7" in said.pop()


def test_all_ranks_evaluate_and_show_what_one_whole_would(trained: Path) -> None:
    config, task = made("base")
    train(task, config, ALONE)
    expected = task.evaluate(rows_at(config, range(1000, 1008)))
    first, second = (found_by(rank, trained)["judged"] for rank in (0, 1))
    assert first == second
    assert first.pop("png") > 0
    assert first == pytest.approx(expected, rel=1e-4)


def test_an_adapter_of_shards_is_merged_into_the_finished_model(trained: Path) -> None:
    """W + alpha / rank * B A of the averages, for each map that has an adapter; all other tensors as they were."""
    (attempt,) = (trained / "adapter-2-finished" / "model").iterdir()
    own, average = load_bundle(attempt).module.state_dict(), below("ema.", weights_in(trained / "adapter-2"))
    adapted = [name for name in own if name not in average]
    assert adapted
    for name in own:
        if name in average:
            torch.testing.assert_close(own[name], average[name], rtol=0, atol=0)
            continue
        stem, kind = name.rsplit(".", 1)
        expected = average[f"{stem}.base_layer.{kind}"]
        if kind == "weight":
            change = average[f"{stem}.lora_B.default.weight"] @ average[f"{stem}.lora_A.default.weight"]
            assert change.any()
            expected = expected + ADAPTER["alpha"] / ADAPTER["rank"] * change
        torch.testing.assert_close(own[name], expected)


@pytest.mark.parametrize("run", ["dit-2", "base-2", "base-4", "base-copies"])
def test_a_model_and_its_snapshots_are_joined_of_the_rows_of_all_ranks(run: str, trained: Path, tmp_path: Path) -> None:
    """The very bytes that one host would write that has all, read without a process group."""
    weights, kind = weights_in(trained / run), run.split("-")[0]
    place = trained / f"{run}-finished"
    (attempt,) = (place / "model").iterdir()
    assert not dist.is_initialized()
    network = load_bundle(attempt).module.state_dict()
    if kind == "base":
        (wide, narrow) = (below(name, weights) for name in ("second_ema.", "ema."))  # 0.05 is nearest
        for width, average in (("0.100", wide), ("0.050", narrow)):
            save_file({name: tensor.contiguous() for name, tensor in average.items()}, tmp_path / "whole")
            whole = (tmp_path / "whole").read_bytes()
            assert (attempt / SNAPSHOTS / f"{width}-{STEPS:09d}.safetensors").read_bytes() == whole
        assert_close(network, narrow)
    else:
        assert_equal_bits(network, below("network.", weights))
    assert sorted(path.name for path in attempt.iterdir() if path.is_file()) == [METRICS, DESCRIPTION, WEIGHTS]
    assert [path.name for path in (place / "run").iterdir() if path.name == ROWS] == []
