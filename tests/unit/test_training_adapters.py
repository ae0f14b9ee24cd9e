"""Low-rank adapters: what is trained, what the finished model holds, what is refused."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from components.configuration.conditions import TokenGrid
from components.configuration.optimization import StartConfig
from components.configuration.usage import UsageError
from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.runtime.storage.store import Store
from components.training.adapters import PREFIX, AdapterError
from components.training.batches import to_batch
from components.training.learner import make_network
from components.training.loop import fit
from components.training.results import ModelDescription, finish
from components.weights.starts import start_loader
from pipelines.planning.memory import step_model
from pipelines.planning.preflight import Needs, check_needs
from tests.refusals import one_line
from tests.tiny_training import (
    DATASET_INFO,
    GRID,
    assert_equal_bits,
    batches,
    diffusion_config,
    dit_config,
    make_task,
    prior_config,
    weights_of,
)
from tests.trained_networks import resumed

ADAPTER = {"kind": "lora", "rank": 4, "alpha": 8}
MODELS: dict[str, tuple[Callable[..., Any], TokenGrid | None]] = {
    "unet": (partial(diffusion_config, text_conditioning="cross_attention"), None),
    "spatial": (partial(diffusion_config, text_conditioning="spatial_transformer"), None),
    "dit": (dit_config, None),
    "prior": (partial(prior_config, dropout=0.0), GRID),
}


class Begun:
    """A training of an adapter, of a start in a folder."""

    def __init__(self, folder: Path, kind: str, *ignore: str, **changes: Any) -> None:
        make_config, self.grid = MODELS[kind]
        plain = make_config(total_steps=8, warmup_steps=2, checkpoint_every=4, learning_rate=1e-2, **changes)
        torch.manual_seed(3)
        self.network = make_network(plain, DATASET_INFO, self.grid)
        for tensor in self.network.parameters():
            nn.init.normal_(tensor, std=0.1)
        self.arguments = plain.network_arguments(DATASET_INFO, self.grid)
        save_bundle(folder / "start", ModelBundle(plain.network.kind, self.arguments, {}, self.network))
        start = StartConfig(uri=str(folder / "start"), ignore=ignore)
        self.config = plain.replace(init_from=start, adapter=ADAPTER)
        self.load = start_loader(self.config, DATASET_INFO, self.grid, bpe=None)
        self.task = make_task(self.config, load_start=self.load)

    def train(self, folder: Path) -> Path:
        """The folder of the finished model."""
        fit(self.task, batches(self.config, to_batch), self.config.optimization)
        kind, ignore = self.config.network.kind, self.config.init_from.ignore
        described = ModelDescription(
            kind, self.arguments, {}, adapter=self.config.adapter, new_modules=ignore, texts={"bpe.json": "{}"}
        )
        store = Store(str(folder))
        weights = self.task.state_dict()["weights"]
        finish(store.join("run"), store, described, weights=weights, summary={}, previews={})
        return next(folder.glob("attempt-*"))


def pairs(model: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module."""
    tensors = load_file(model / "adapter/adapter_model.safetensors")
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    return {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]) for name in modules
    }


@pytest.mark.parametrize("kind", MODELS)
def test_the_finished_model_is_the_start_with_the_product_of_the_adapter(tmp_path: Path, kind: str):
    begun = Begun(tmp_path, kind)
    before = begun.network.state_dict()
    model = begun.train(tmp_path)
    after = load_bundle(model).module.state_dict()
    assert after.keys() == before.keys()
    products = pairs(model)
    moved = 0.0
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        if module not in products:
            assert torch.equal(tensor, before[name]), name
            continue
        a, b = products[module]
        product = 2 * (b.flatten(1) @ a.flatten(1)).view_as(tensor)  # alpha / rank
        moved = max(moved, float(product.abs().max()))
        torch.testing.assert_close(tensor, before[name] + product, rtol=1e-5, atol=1e-6)
    assert moved > 1e-3


def test_peft_reads_the_adapter_and_computes_what_the_model_does(tmp_path: Path):
    begun = Begun(tmp_path, "dit")
    model = begun.train(tmp_path)
    theirs = PeftModel.from_pretrained(load_bundle(tmp_path / "start").module, str(model / "adapter")).eval()
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    text = torch.tensor([[1, 5, 6, 7, 2, 0]] * 2)
    conditions = {"label": torch.tensor([0, 2]), "text": text}
    ours = load_bundle(model).module(x, time, **conditions)
    torch.testing.assert_close(theirs(x, time, **conditions), ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(begun.task.learner.snapshot()(x, time, **conditions), ours, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_and_new_modules_are_trained(tmp_path: Path):
    begun = Begun(tmp_path, "unet", "class_embedding", "text_encoder")
    learner, network = begun.task.learner, begun.task.learner.network
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "lora_" in name and name.startswith("text_encoder")]
    assert {name.partition(".")[0] for name in trained if "lora_" not in name} == {"class_embedding", "text_encoder"}
    begun.task.train_step(next(batches(begun.config, to_batch)), 1)
    assert len(learner.optimizer.state) == len(trained) < len([*network.parameters()])
    counted = step_model(begun.config, DATASET_INFO).network
    assert {name for name, each in counted.named_parameters() if each.requires_grad} == trained
    model = begun.train(tmp_path)
    after, before = load_bundle(model).module.state_dict(), begun.network.state_dict()
    assert not torch.equal(after["class_embedding.weight"], before["class_embedding.weight"])
    assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_a_training_of_an_adapter_begins_at_the_start(tmp_path: Path):
    begun = Begun(tmp_path, "dit")
    x, time, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 40]), torch.tensor([0, 2])
    conditions = {"label": label, "text": torch.tensor([[1, 5, 6, 7, 2, 0]] * 2)}
    for network in (begun.task.learner.network, begun.task.learner.snapshot()):
        assert torch.equal(network.eval()(x, time, **conditions), begun.network.eval()(x, time, **conditions))


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_needs_no_start_and_has_the_same_bits(tmp_path: Path, kind: str):
    begun = Begun(tmp_path, kind)
    config = begun.config
    broken_off = make_task(config, load_start=begun.load)
    fit(begun.task, batches(config, to_batch), config.optimization)
    fit(broken_off, batches(config, to_batch), config.optimization.model_copy(update={"total_steps": 4}))
    shutil.rmtree(tmp_path / "start")
    task = resumed(tmp_path, config, broken_off, make_task)
    assert_equal_bits(weights_of(task), weights_of(begun.task))


START = {"uri": "somewhere"}


@pytest.mark.parametrize(
    ("make_config", "targets", "words"),
    [
        (dit_config, ("quv", "prj"), "adapter: no module is named as one of quv, prj; set adapter.targets"),
        (diffusion_config, ("qkv", "skip"), "adapter: not every module is linear or a convolution among qkv, skip"),
    ],
)
def test_targets_that_take_no_adapter_are_refused(make_config: Callable[..., Any], targets: tuple, words: str):
    with one_line(AdapterError, match=words):
        make_task(make_config(init_from=START, adapter=ADAPTER | {"targets": targets}))


def test_a_missing_package_is_one_line_with_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with one_line(UsageError, match=r"pip install 'image-cascade\[adapters\]'"):
        check_needs(Needs(configs=(dit_config(init_from=START, adapter=ADAPTER),)))
