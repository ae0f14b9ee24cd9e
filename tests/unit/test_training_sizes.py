"""Laws of sizes: what a training is said to write is what it writes, told without memory and for every recipe."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from components.models.bundle import NETWORKS
from components.runtime.storage.store import Store
from components.training.batches import to_batch
from components.training.learner import make_network
from components.training.results import ModelDescription, write_model, write_snapshots
from pipelines.planning.memory import checkpoint_bytes, device_bytes, model_bytes, step_model
from pipelines.planning.preflight import space_of
from pipelines.recipes.catalog import RECIPES
from pipelines.workflow import PlannedStage
from pipelines.workflows import build_workflow
from tests import tiny_autoencoders
from tests.tiny_text_image import contrastive_config
from tests.tiny_training import (
    DATASET_INFO,
    GRID,
    KINDS,
    autoencoder_config,
    batches,
    config_of,
    diffusion_config,
    make_task,
)

ADAM = ("exp_avg", "exp_avg_sq")


def moments(state: Any) -> Iterator[Tensor]:
    """The tensors of every optimizer in a task's state."""
    if isinstance(state, dict):
        for name, value in state.items():
            yield from [value] if name in ADAM else moments(value)


def written(task: Any, config: Any) -> int:
    """Bytes of weights, averages and moments after a step."""
    task.train_step(next(batches(config, to_batch)), 1)
    state = task.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in [*state["weights"].values(), *moments(state)])


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_a_checkpoint_takes_what_is_said(kind: str):
    config = config_of(kind)
    grid = GRID if kind in ("prior", "masked_prior") else None
    assert checkpoint_bytes(step_model(config, DATASET_INFO, grid)) == written(make_task(config), config)


@pytest.mark.parametrize("changes", [{"ema": "power"}, {"ema_decay": 0.0}])
def test_averages_count_as_many_times_as_they_are_kept(changes: dict[str, Any]):
    config = diffusion_config(**changes)
    assert checkpoint_bytes(step_model(config, DATASET_INFO)) == written(make_task(config), config)


def test_an_autoencoder_without_adversary_has_none_in_its_checkpoint():
    config = autoencoder_config(adversarial_weight=0.0)
    assert checkpoint_bytes(step_model(config, DATASET_INFO)) == written(make_task(config), config)


def test_a_contrastive_encoder_counts_too():
    config = contrastive_config()
    assert checkpoint_bytes(step_model(config, DATASET_INFO)) == written(make_task(config), config)


def test_a_power_average_leaves_snapshots_in_its_model(tmp_path):
    config = diffusion_config(ema="power", total_steps=20, checkpoint_every=8)  # at 8, 16 and 20
    state = make_task(config).state_dict()
    for updates in (8, 16, 20):
        state["learner"]["ema_updates"] = updates
        write_snapshots(tmp_path / "snapshots", state, sigma_rel=config.optimization.ema_sigma_rel)
    files = sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir())
    weights = model_bytes(step_model(diffusion_config(), DATASET_INFO))
    assert model_bytes(step_model(config, DATASET_INFO)) == 7 * weights
    assert 6 * weights <= files < 6.5 * weights


def test_a_model_takes_what_is_said(tmp_path):
    config = autoencoder_config()
    network = config.network_arguments()
    weights = {f"network.{name}": t for name, t in NETWORKS["autoencoder"](**network).state_dict().items()}
    description = ModelDescription("autoencoder", network, {})
    write_model(tmp_path, description, weights=weights, summary={}, previews={})
    said = model_bytes(step_model(config, DATASET_INFO))
    assert said <= (tmp_path / "model.safetensors").stat().st_size < 1.2 * said


@pytest.mark.parametrize("name", tiny_autoencoders.RECIPES)
def test_the_grid_of_tokens_is_known_without_the_tokenizer(name: str):
    config = tiny_autoencoders.config_of(name)
    grid, network = config.token_grid, make_network(config)
    assert (grid is not None) == config.has_codes == (config.network.bottleneck.kind != "gaussian")
    if grid is not None:
        assert (grid.codebook_size, (grid.height, grid.width)) == (network.codebook_size, network.grid)


@pytest.mark.parametrize("name", RECIPES)
def test_the_room_for_every_recipe_is_known(name: str):
    workflow = build_workflow(RECIPES[name]())
    planned = [PlannedStage(stage, "key", Store("/nowhere"), None, True, {}) for stage in workflow.stages]
    space = space_of(workflow, planned)
    assert space.storage > space.temporary > 2**20
    assert space_of(workflow, [entry._replace(wanted=False) for entry in planned]).trainings == ()


def test_the_demo_s_sizes_are_told_without_loading_what_draws_and_proves():
    """torch imports sympy, a second's worth, for the first normal number without memory."""
    program = """
import sys
from pipelines.recipes.systems import openmoji
from components.configuration.conditions import DatasetInfo
from pipelines.planning.memory import checkpoint_bytes, step_model
before = "sympy" in sys.modules
for config in (openmoji().base, openmoji().tokenizer):
    checkpoint_bytes(step_model(config, DatasetInfo(num_classes=9, vocab_size=1024, text_length=16)))
print(before, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("kind", [*KINDS, "gan"])
def test_a_device_holds_what_a_checkpoint_does_and_gradients(kind: str):
    config, grid = config_of(kind), GRID if kind in ("prior", "masked_prior") else None
    model = step_model(config, DATASET_INFO, grid)
    held = device_bytes(model)
    assert sum(held) == checkpoint_bytes(model) + held.gradients
    assert held.gathered == 0


@pytest.mark.parametrize("shards", [2, 64])
@pytest.mark.parametrize("kind", ["prior", "base", "dit"])
def test_each_of_several_shards_holds_its_rows_of_every_tensor(kind: str, shards: int):
    config, grid = config_of(kind, ema="power"), GRID if kind == "prior" else None
    model = step_model(config, DATASET_INFO, grid)
    whole, cut = (device_bytes(model, shards=count) for count in (1, shards))
    assert whole.averages == 2 * whole.weights
    assert cut.averages == 2 * cut.weights
    assert cut.optimizer == 2 * cut.gradients
    assert whole.weights / shards <= cut.weights < (0.6 if shards == 2 else 0.3) * whole.weights
    assert cut.gathered > 0
