"""Laws of a training run, held by each task without Ray; one that was broken off ends with the same bits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from components.sampling import device as devices
from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.optim import NonFiniteError
from tests import tiny_autoencoders
from tests.tiny_text_image import (
    TEXT_IMAGE,
    classifier_config,
    contrastive_config,
    decoder_config,
    prior_config,
    prior_task,
)
from tests.tiny_training import (
    KINDS,
    assert_close,
    assert_equal_bits,
    batches,
    config_of,
    make_task,
    pixel_config,
    rows_at,
    weights_of,
)
from tests.tiny_training import prior_config as token_prior_config
from tests.trained_networks import FROZEN, made, resumed

ROUNDED = ("tokenizer", "prior", "pixelcnn", "hybrid", "gan")  # a task each
RELAXED = {name: {"temperature_steps": 0, "final_temperature": 1.0} for name in tiny_autoencoders.RECIPES}
TRAINED = [*KINDS, "classifier", "diffusion_prior"]


@pytest.mark.parametrize("kind", [*TRAINED, "decoder", *RELAXED])
def test_training_moves_every_weight_and_lowers_the_loss(kind: str) -> None:
    """Of an autoencoder the reconstruction's: other losses of it have a moving adversary or growing weights."""
    steps: dict[str, Any] = {"total_steps": 60 if kind in TEXT_IMAGE else 40, "warmup_steps": 2}
    config, task = made(kind, **steps, **RELAXED.get(kind, {}))
    before, losses = weights_of(task), []
    batch = next(batches(config, to_batch))
    for step in range(1, config.optimization.total_steps + 1):
        metrics = task.train_step(batch, step)
        losses.append(float(metrics.get("reconstruction_loss", metrics["loss"])))
    after = weights_of(task)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "network." in name], still
    if kind in FROZEN:  # nothing of a frozen network is stored
        assert not [name for name in before if "text_encoder" in name or "image_encoder" in name]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * abs(sum(losses[:5]))


@pytest.mark.parametrize("kind", [*KINDS, *TEXT_IMAGE, "decoder", *tiny_autoencoders.RECIPES])
def test_accumulation_equals_no_accumulation(kind: str) -> None:
    """So noise belongs to the sample and not to its batch."""
    changes: dict[str, Any] = {"codebook_init": "data"} if kind == "vq_vae_ema" else {}
    weights = []
    for parts in (None, 3):
        config, task = made(kind, parts=parts, total_steps=4, warmup_steps=2, **changes)
        fit(task, batches(config, to_batch), config.optimization)
        weights.append(weights_of(task))
    assert_close(*reversed(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_previews_are_images(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    for name, png in make_task(config).preview(rows_at(config, range(1000, 1012)), 1).items():
        (tmp_path / f"{name}.png").write_bytes(png)
        assert Image.open(tmp_path / f"{name}.png").size[0] == 8 * 64


@pytest.mark.parametrize(
    ("kind", "learner"), [*((kind, "learner") for kind in (*TRAINED, "contrastive", "gan")), ("gan", "discriminator")]
)
def test_a_single_non_finite_batch_changes_nothing_and_several_stop_the_run(kind: str, learner: str) -> None:
    """Not even singular vectors, which move with every forward."""
    config, task = made(kind)
    batch = next(batches(config, to_batch))
    task.train_step(batch, 1)
    before = weights_of(task)  # a matrix: the contrastive encoder's scale is kept within bounds by itself
    parameter = next(each for each in getattr(task, learner).network.parameters() if each.ndim > 1)
    healthy = parameter.detach().clone()
    parameter.data.fill_(float("inf"))  # the loss and all gradients are then NaN
    task.train_step(batch, 2)
    parameter.data.copy_(healthy)
    assert_equal_bits(weights_of(task), before)
    parameter.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="lower learning_rate"):
        fit(task, batches(config, to_batch), config.optimization)


CASES: dict[str, tuple[Callable[..., Any], Callable[[Any], Task]]] = {  # what makes configuration and task
    **{f"{kind} fp32": (partial(config_of, kind), make_task) for kind in (*KINDS, "gan")},
    **{f"{kind} bf16": (partial(config_of, kind, precision="bf16"), make_task) for kind in ROUNDED},
    **{name: (partial(tiny_autoencoders.config_of, name), make_task) for name in tiny_autoencoders.RECIPES},
    **{
        f"{kind} of tokens": (partial(pixel_config, network=kind, resolution=None), make_task)
        for kind in ("pixelcnn", "row_lstm")
    },
    **{f"{kind} by Muon": (partial(config_of, kind, optimizer="muon"), make_task) for kind in ("prior", "base", "gan")},
    "power average": (partial(token_prior_config, ema="power", ema_sigma_rel=0.07), make_task),
    "contrastive": (contrastive_config, make_task),
    "diffusion prior": (partial(prior_config, dropout=0.1), prior_task),
    "classifier": (partial(classifier_config, dropout=0.1), make_task),
    "decoder of frozen encoders": (partial(decoder_config, cond_drop="independent", dropout=0.0), prior_task),
}


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors resume in bf16 too here, where they take fp32."""
    monkeypatch.setattr(devices, "native_bf16", lambda device: True)
    monkeypatch.setattr(devices, "IN_FP32", ())


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    """8 steps == 4 + restore in a new task + 4; evaluated and shown on the way in one of them only."""
    make_config, make = CASES[name]
    config = make_config(total_steps=8, warmup_steps=2, checkpoint_every=4)
    uninterrupted, broken_off, rows = make(config), make(config), rows_at(config, range(1000, 1012))
    fit(uninterrupted, batches(config, to_batch), config.optimization)
    fit(broken_off, batches(config, to_batch), config.optimization.model_copy(update={"total_steps": 4}))
    assert broken_off.evaluate(rows) == broken_off.evaluate(rows)
    broken_off.preview(rows, 4)
    task = resumed(tmp_path, config, broken_off, make)
    assert_equal_bits(weights_of(task), weights_of(uninterrupted))
