"""One law of every task: a run that was broken off and taken up again ends with the bits of one that was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.sampling import device as devices
from components.training.batches import to_batch
from components.training.checkpoint import read_checkpoint
from components.training.loop import Task, fit
from tests import tiny_autoencoders
from tests.checkpoints import write_checkpoint
from tests.tiny_text_image import classifier_config, contrastive_config, decoder_config, prior_config, prior_task
from tests.tiny_training import (
    KINDS,
    assert_equal_bits,
    batches,
    config_of,
    gan_config,
    make_task,
    pixel_config,
    rows_at,
    weights_of,
)
from tests.tiny_training import prior_config as token_prior_config

Case = tuple[Any, Callable[[Any], Task]]  # configuration, and what makes its task


CASES: dict[str, Case] = {
    **{f"{kind} {p}": (config_of(kind, precision=p), make_task) for kind in KINDS for p in ("fp32", "bf16")},
    **{f"gan {p}": (gan_config(precision=p), make_task) for p in ("fp32", "bf16")},
    **{name: (tiny_autoencoders.config_of(name), make_task) for name in tiny_autoencoders.RECIPES},
    **{
        f"{kind} of tokens": (pixel_config(network=kind, resolution=None), make_task)
        for kind in ("pixelcnn", "row_lstm")
    },
    "power average": (token_prior_config(ema="power", ema_sigma_rel=0.07), make_task),
    "contrastive": (contrastive_config(), make_task),
    "diffusion prior": (prior_config(dropout=0.1), prior_task),
    "classifier": (classifier_config(dropout=0.1), make_task),
    "decoder of frozen encoders": (decoder_config(cond_drop="independent", dropout=0.0), prior_task),
}


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also processors without it resume in bf16 here, where they would take fp32."""
    monkeypatch.setattr(devices, "native_bf16", lambda device: True)


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    """20 steps == 10 + restore in a new task + 10; evaluated and shown on the way in one of them only."""
    config, make = CASES[name]
    uninterrupted, rows = make(config), rows_at(config, range(1000, 1012))
    fit(uninterrupted, batches(config, to_batch), config.optimization)

    def save(step: int, task: Task) -> None:
        assert task.evaluate(rows) == task.evaluate(rows)
        task.preview(rows, step)
        write_checkpoint(tmp_path / str(step), task.state_dict(), step=step)

    fit(make(config), batches(config, to_batch), config.optimization, save=save)
    torch.rand(17)  # what happened in the process since must not matter
    task = make(config)
    step, state = read_checkpoint(tmp_path / "10")
    assert step == 10
    task.load_state_dict(state)
    fit(task, batches(config, to_batch, start_step=step), config.optimization, start_step=step)
    assert_equal_bits(weights_of(task), weights_of(uninterrupted))
