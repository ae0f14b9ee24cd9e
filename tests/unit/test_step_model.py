"""A step costs and keeps what is said of it, and a training writes it: told without memory, held to the real ones."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.configuration.conditions import TokenGrid
from components.configuration.trainings import DiffusionPriorTraining
from components.models.bundle import NETWORKS
from components.models.devices import autocast, autocast_dtype
from components.runtime.storage.store import Store
from components.training.activations import GPUKernels, Keeping, Kept, activations, step_keeps
from components.training.batches import to_batch
from components.training.checkpoint import copy_to_host
from components.training.learner import make_network
from components.training.loop import Batch, Task
from components.training.results import ModelDescription, write_averaged, write_model, write_snapshots
from components.training.step_model import KnownLayouts, StepModel, WithoutNumbers, learners_of
from pipelines.planning.memory import checkpoint_bytes, device_bytes, model_bytes, step_model
from pipelines.planning.preflight import space_of
from pipelines.recipes.catalog import RECIPES
from pipelines.workflow import PlannedStage
from pipelines.workflows import build_workflow
from tests import tiny_autoencoders
from tests.tiny_text_image import PRIOR_DATASET_INFO, classifier_config, contrastive_config, prior_config, prior_task
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
from tests.trained_networks import TRAININGS

META = torch.device("meta")
TWO_PASSES = ("gan", "contrastive")  # a step's second pass begins when the first has let go of what it kept
WHOLE_STEP = [name for name in TRAININGS if name not in TWO_PASSES]
ADAM = ("exp_avg", "exp_avg_sq")
STEPS = {
    **{kind: config_of(kind) for kind in (*KINDS, "gan", "edm", "flow", "vlb")},
    **{name: tiny_autoencoders.config_of(name) for name in tiny_autoencoders.RECIPES},
    "classifier": classifier_config(),
    "classifier of clean images": classifier_config(noisy=False, process={"kind": "discrete"}),
    **{f"contrastive, {pairs} pairs": contrastive_config(global_batch_size=pairs) for pairs in (2, 8)},
}
SAVED = {name: STEPS[name] for name in (*KINDS, "gan", "contrastive, 8 pairs")} | {
    "two averages": diffusion_config(ema="power"),
    "no average": diffusion_config(ema_decay=0.0),
    "by Muon": autoencoder_config(optimizer="muon"),
    "no adversary": autoencoder_config(adversarial_weight=0.0),
}


def grid_of(config: Any) -> TokenGrid | None:
    """The tokens that a training learns from, where it does."""
    data = getattr(config, "data", None)
    return GRID if data is None or data.resolution is None else None


def model_of(config: Any) -> StepModel:
    info = PRIOR_DATASET_INFO if isinstance(config, DiffusionPriorTraining) else DATASET_INFO
    return StepModel(config, info, grid=grid_of(config))


def said(config: Any) -> list[Kept]:
    """Counted on the meta device, with the kernels of a CPU's plain attention."""
    model = model_of(config)
    with WithoutNumbers(), sdpa_kernel(SDPBackend.MATH):
        return step_keeps(model.loaded_task(), model.batch(8), step=config.optimization.total_steps)


def flops(config: Any, **step: int) -> int:
    return model_of(config).flops(**step)


def real(name: str, config: Any) -> tuple[Task, Batch]:
    return TRAININGS[name].task(config), next(batches(config, to_batch))


def kept_in_a_step(name: str, config: Any) -> Kept:
    """Counted in a real step of training on this CPU."""
    task, batch = real(name, config)
    task.train_step(batch, 1)
    with sdpa_kernel(SDPBackend.MATH):
        keeping = Keeping([learner.network for learner in learners_of(task)])
        with keeping.during():
            task.train_step(batch, config.optimization.total_steps)
        return keeping.kept()


def counted(task: Task, batch: Batch, *, step: int) -> int:
    """Operations of a real step on this CPU. The first step of a codebook is another one: it is taken before."""
    task.train_step(batch, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.train_step(batch, step)
    return counter.get_total_flops()


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


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_keeps_what_is_told_to_the_byte(name: str) -> None:
    """Of two passes the larger one."""
    config = TRAININGS[name].config()
    if name not in TWO_PASSES:
        assert said(config) == [kept_in_a_step(name, config)]
        return
    task, batch = real(name, config)
    with sdpa_kernel(SDPBackend.MATH):
        assert said(config) == step_keeps(task, batch, step=config.optimization.total_steps)


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_a_step_that_computes_its_blocks_again_keeps_what_is_told(name: str) -> None:
    config = TRAININGS[name].config()
    (counted,) = said(config)
    assert counted.recomputed < counted.whole
    again = kept_in_a_step(name, TRAININGS[name].config(gradient_checkpointing=True))
    assert again.recomputed == counted.recomputed
    options = 0.05 * counted.recomputed  # masks and labels that blocks are given by name, which torch's hooks don't see
    assert counted.recomputed - options < again.whole <= counted.recomputed


@pytest.mark.parametrize("name", TRAININGS)
def test_what_is_kept_grows_linearly_in_samples(name: str) -> None:
    config = TRAININGS[name].config(precision="bf16")
    model = model_of(config)
    kept = activations(model)
    with GPUKernels():
        passes = step_keeps(model.loaded_task(), model.batch(6), step=config.optimization.total_steps)
    assert kept.whole.of(6) == max(each.whole for each in passes)
    assert kept.recomputed.of(6) == max(each.recomputed for each in passes)
    assert kept.block.of(6) >= max(block for each in passes for block in each.blocks)
    assert kept.whole.sample > kept.recomputed.sample > 0


@pytest.mark.parametrize("name", ["base", "prior", "tokenizer"])
def test_in_bf16_samples_keep_less_and_copies_of_the_weights_stay_beside_them(name: str) -> None:
    fp32, bf16 = (
        activations(model_of(config))
        for config in (TRAININGS[name].config(precision=precision) for precision in ("fp32", "bf16"))
    )
    assert bf16.whole.sample < fp32.whole.sample
    assert bf16.whole.fixed > fp32.whole.fixed


def test_a_model_of_gray_images_is_counted_though_it_checks_the_colors_of_real_ones() -> None:
    config = TRAININGS["pixelcnn"].config(in_channels=1)
    task, batch = real("pixelcnn", config)
    batch["image"] = batch["image"][:, :1].expand(-1, 3, -1, -1)
    with sdpa_kernel(SDPBackend.MATH):
        assert said(config) == step_keeps(task, batch, step=config.optimization.total_steps)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_innermost_autocast_counts_on_the_meta_device_as_on_others(enabled: bool) -> None:
    for device in (META, torch.device("cpu")):
        x, weight = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device, requires_grad=True)
        with autocast(device, enabled=True), nullcontext() if enabled else autocast(device, enabled=False):
            made = torch.nn.functional.linear(x, weight)
            assert (autocast_dtype(device) == torch.bfloat16) == enabled
        assert made.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert made.softmax(dim=1).dtype == made.dtype, "outside nothing is cast"
        assert autocast_dtype(device) is None


def test_a_weight_is_copied_to_bf16_once_in_an_autocast_however_often_it_is_used() -> None:
    x, weight = torch.ones(2, 3, device=META), torch.ones(3, 3, device=META, requires_grad=True)
    keeping = Keeping()
    with keeping.during(), autocast(META, enabled=True):
        product = (x @ weight) @ weight
    assert product.requires_grad
    copies = [2 * weight.numel(), 2 * x.numel(), 2 * x.numel()]  # of the weight, of x, and of what is between
    assert keeping.kept().whole == sum(copies)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_what_is_told(name: str) -> None:
    config = STEPS[name]
    assert flops(config) == counted(make_task(config), next(batches(config, to_batch)), step=20) > 0


def test_a_step_of_a_diffusion_prior_costs_what_is_told_and_what_its_frozen_encoders_make_at_each_step():
    config, encoder = prior_config(), contrastive_config()
    info = PRIOR_DATASET_INFO.replace(vocab_size=280, text_length=6)
    real = counted(prior_task(config), next(batches(config, to_batch)), step=20)
    maker, own = StepModel(encoder, info), StepModel(config, info).flops()
    frozen = maker.encoding_flops("image_embedding") + maker.encoding_flops("text_states")
    assert own + config.optimization.global_batch_size * frozen == real > own


def test_the_discriminator_costs_more_once_it_is_heard_and_a_whole_training_knows_when_that_is():
    config = config_of("tokenizer")
    batch = next(batches(config, to_batch))
    quiet, heard = (counted(make_task(config), batch, step=step) for step in (3, 4))
    assert (flops(config, step=3), flops(config, step=4)) == (quiet, heard)
    assert quiet < heard
    assert StepModel(config).training_flops() == (heard, 3 * quiet + 17 * heard)


def test_recomputed_activations_are_no_part_of_what_a_model_needs():
    assert flops(config_of("base", gradient_checkpointing=True)) == flops(config_of("base"))


def test_what_a_frozen_autoencoder_makes_costs_its_encoder_alone():
    config = config_of("tokenizer")
    network, image = make_task(config).generator.network, torch.zeros(3, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.to_latents(image)
    assert 3 * StepModel(config).encoding_flops("latents") == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_takes_what_is_said_and_a_device_holds_that_and_gradients(name: str) -> None:
    config = SAVED[name]
    model = step_model(config, DATASET_INFO, grid_of(config))
    assert checkpoint_bytes(model) == written(make_task(config), config)
    held = device_bytes(model)
    assert sum(held) == checkpoint_bytes(model) + held.gradients
    assert held.gathered == 0


def test_a_power_average_leaves_snapshots_in_its_model(tmp_path):
    config = diffusion_config(ema="power", total_steps=20, checkpoint_every=8)  # at 8, 16 and 20
    copy = copy_to_host(make_task(config).state_dict(), step=8)
    for updates in (8, 16, 20):
        copy.state["task"]["learner"]["ema_updates"] = updates
        write_snapshots(tmp_path / "snapshots", copy, sigma_rel=config.optimization.ema_sigma_rel)
    files = sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir())
    weights = model_bytes(step_model(diffusion_config(), DATASET_INFO))
    assert model_bytes(step_model(config, DATASET_INFO)) == 7 * weights
    assert 6 * weights <= files < 6.5 * weights


def test_a_model_takes_what_is_said(tmp_path):
    config = autoencoder_config()
    network = config.network_arguments()
    weights = {f"network.{name}": t for name, t in NETWORKS["autoencoder"](**network).state_dict().items()}
    description = ModelDescription("autoencoder", network, {})
    write_averaged(tmp_path, description, weights)
    write_model(tmp_path, description, summary={}, previews={})
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


def seen(x: Tensor) -> list[tuple[Any, ...]]:
    """Layouts of what operations make of x, and whether x's storage is theirs."""
    flat = torch.ops.aten._unsafe_view(x, (6, 4))
    made = [
        x * 2,
        x.long() * 2,
        x.long() * 2.0,
        x.half(),
        x.transpose(0, 1),
        flat,
        x.add_(1),
        x.sum(0),
        *x.split(1),
        x.contiguous(),
        x.clone(),
    ]
    made += [*torch.native_layer_norm(x, (4,), None, None, 1e-5), x @ x.transpose(1, 2)]
    own = x.untyped_storage()._cdata
    return [
        (*each.shape, each.stride(), each.dtype, each.device, each.untyped_storage()._cdata == own) for each in made
    ]


def test_layouts_that_were_seen_before_are_those_that_torch_derives():
    """Of views and of what is written in place, the storage stays that of the argument."""
    given = torch.empty(2, 3, 4, device=META)
    derived = seen(given)
    with KnownLayouts():
        assert [seen(given) for _ in range(3)] == [derived] * 3


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


@pytest.mark.parametrize("shards", [2, 64])
@pytest.mark.parametrize("kind", ["prior", "base", "dit"])
def test_each_of_several_shards_holds_its_rows_of_every_tensor(kind: str, shards: int):
    config = config_of(kind, ema="power")
    model = step_model(config, DATASET_INFO, grid_of(config))
    whole, cut = (device_bytes(model, shards=count) for count in (1, shards))
    assert whole.averages == 2 * whole.weights
    assert cut.averages == 2 * cut.weights
    assert cut.optimizer == 2 * cut.gradients
    assert whole.weights / shards <= cut.weights < (0.6 if shards == 2 else 0.3) * whole.weights
    assert cut.gathered > 0
