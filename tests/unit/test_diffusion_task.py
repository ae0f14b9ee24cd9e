"""Laws of the diffusion task that belong to no other: every objective trains, resumes and samples."""

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from components.configuration.conditions import DatasetInfo
from components.configuration.optimization import OptimizationConfig
from components.data.decoded import ImageSamples
from components.data.held_out import held_out_arrays
from components.data.shards import View
from components.data.stream import rank_batches
from components.models.bundle import ModelBundle, save_bundle
from components.models.diffusion.discrete import KEPT, record
from components.models.diffusion.steps import SAMPLERS
from components.runtime.events import Recorder
from components.runtime.execution import Resources
from components.runtime.storage.store import Store
from components.sampling.generators.diffusion import denoise, sample_upsampler
from components.sampling.model import load_model
from components.sampling.plan import plan_of
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.frozen import Latents
from components.training.loop import fit
from components.training.parallel import ALONE
from components.training.results import ModelDescription
from components.training.tasks.diffusion import DiffusionTask
from components.training.worker import TrainingJob
from tests.house import ROOT
from tests.tiny_cascade import CLASSES
from tests.tiny_training import DATASET_INFO, DIFFUSIONS, batches, config_of, make_task, rows_at

KINDS = ["base", *DIFFUSIONS]


@pytest.mark.parametrize("kind", ["vlb", "zero_terminal_snr", "edm", "flow"])
def test_every_objective_lowers_its_loss_on_a_batch(kind: str) -> None:
    config = config_of(kind, total_steps=40, warmup_steps=2, dropout=0.0, learning_rate=5e-3)
    task, batch = make_task(config), next(batches(config, to_batch))
    losses = [float(task.train_step(batch, step)["loss"]) for step in range(1, 41)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_samples_by_every_sampler_as_its_settings_say(kind: str, tmp_path: Path) -> None:
    """The bundle rebuilds the objective; a request may name another sampler, and each image belongs to its seed."""
    config = config_of(kind, conditions=("label",))
    network = make_task(config).learner.network
    torch.nn.init.normal_(network.conv_out.weight, std=0.3)
    arguments, settings = config.network_arguments(DATASET_INFO), config.settings(tuple(CLASSES))
    save_bundle(tmp_path / "model", ModelBundle("unet", arguments, settings, network))
    sampling = {"num_inference_steps": 2, "guidance_interval": (0.1, 5.0)}
    model = load_model("base", tmp_path / "model", sampling=sampling)
    requests = [Request(label=0, seed=seed, guidance_scale=2.0) for seed in (1, 2)]
    if config.low_res is not None:
        plans = [plan_of(request, [model], model.classes) for request in requests]
        images = sample_upsampler(model, plans, torch.zeros(2, 3, 4, 4))
        assert images.shape == (2, 3, 8, 8)
        return
    for sampler in (None, *SAMPLERS):
        steps = min(3, getattr(config.process, "num_train_timesteps", 3))
        asked = [request.replace(sampler=sampler, steps=steps) for request in requests]
        plans = [plan_of(request, [model], model.classes) for request in asked]
        together, alone = denoise(model, plans), denoise(model, plans[1:])
        assert together.abs().max() <= 1 + 1e-5
        torch.testing.assert_close(together[1:], alone, atol=2 / 255, rtol=0)  # a grey level
        assert not torch.equal(together[0], together[1])


def test_latents_are_not_clipped() -> None:
    config = config_of("base", conditions=("label",))
    task = make_task(config)
    task.encoders = [Latents(torch.nn.Identity(), 1.0)]
    with torch.no_grad():
        for network in (task.learner.network, task.learner.snapshot()):
            network.conv_out.bias.fill_(30.0)
    batch = next(batches(config, to_batch))
    assert task.sample(batch).abs().max() > 3


def test_losses_of_the_steps_drawn_become_the_history_and_then_the_draw() -> None:
    """And held-out losses do not depend on the history."""
    config = config_of("hybrid")
    task, held_out = make_task(config), rows_at(config, range(1000, 1012))
    before = task.evaluate(held_out)
    task.history = record(task.history, timesteps=torch.arange(2).repeat(KEPT), losses=torch.rand(2 * KEPT))
    assert task.evaluate(held_out) == before
    task = make_task(config)
    fit(task, batches(config, to_batch), config.optimization)
    assert (task.history.counts == KEPT).all()
    _, weight = task.sample_timesteps(torch.arange(64))
    assert weight is not None
    assert not torch.equal(weight, torch.ones(64))


def test_the_examples_of_the_room_train_and_describe_a_job() -> None:
    """`train` needs a cluster, so the job is looked at."""
    here, cluster = re.findall(r"```python\n(.*?)```", (ROOT / "components/training/README.md").read_text(), re.DOTALL)
    config = config_of("base", conditions=("label",), total_steps=2, warmup_steps=0)
    names = {each.__name__: each for each in (DatasetInfo, DiffusionTask, fit, ImageSamples, View, Store, TrainingJob)}
    names |= {each.__name__: each for each in (ModelDescription, Recorder, Resources, held_out_arrays, rank_batches)}
    names |= {"config": config, "batches": batches(config, to_batch), "dataset_info": DATASET_INFO, "partial": partial}
    exec(here, names)
    exec(cluster, names | {"index": None, "train": lambda job: job}, made := {})
    job = made["trained"]
    assert isinstance(job.config, OptimizationConfig)
    inspect.signature(job.held_out.func).bind(*job.held_out.args, **job.held_out.keywords)
    inspect.signature(job.stream).bind(rank=0, world_size=1, start_step=0)
    assert isinstance(job.make_task(worker=ALONE), DiffusionTask)
