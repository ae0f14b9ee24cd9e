"""A training in shards on a real Ray cluster: killed and resumed, and its model read as any other."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from components.models.bundle import load_bundle
from components.runtime.storage.store import Store
from components.training.parallel import Worker
from tests.distributed.recording import FileRecorder
from tests.distributed.test_resume import KilledTask, last_weights, run
from tests.tiny_training import assert_equal_bits, diffusion_config

CONFIG = diffusion_config(total_steps=20)


class ShardedTask(KilledTask):
    """Refuses to be trained whole."""

    def __init__(self, config: Any, *, place: str, worker: Worker, **options: Any) -> None:
        assert worker.shards
        super().__init__(config, place=place, worker=worker, **options)


def test_a_killed_worker_of_shards_changes_no_bit_and_the_model_is_an_ordinary_one(ray_cluster: None, tmp_path: Path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    (killed / "target").write_text("0")  # the worker itself
    options = {"config": CONFIG, "sharding": "full"}
    trained = {folder: run(folder, ShardedTask, place=str(folder), **options) for folder in (undisturbed, killed)}
    assert len({line["pid"] for line in FileRecorder(killed / "log.jsonl").lines("metrics")}) == 2  # before and after
    weights = last_weights(undisturbed, CONFIG)
    assert_equal_bits(last_weights(killed, CONFIG), weights)
    assert trained[killed].summary["held_out_loss"] == trained[undisturbed].summary["held_out_loss"] > 0
    assert FileRecorder(undisturbed / "log.jsonl").lines("image"), "no preview was shown"
    for entry in trained[killed].entries:
        Store(str(killed)).download(entry.path, tmp_path / "model", Path(entry.path).name)
    average = {name.removeprefix("ema."): tensor for name, tensor in weights.items() if name.startswith("ema.")}
    assert_equal_bits(load_file(tmp_path / "model" / "model.safetensors"), average)
    assert not torch.distributed.is_initialized()
    assert_equal_bits(load_bundle(tmp_path / "model").module.state_dict(), average)
