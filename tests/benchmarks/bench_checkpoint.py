"""A checkpoint against torch's Distributed Checkpoint (DCP): the same U-Net with AdamW's moments, 400 MB, one rank, the
same disk. Ours hashes every file and fetches it from its store to the node before it is read, as each restart does; DCP
does neither, so its figures are what writing and reading alone would cost.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from components.configuration.optimization import OptimizationConfig
from components.models.unet import UNet
from components.runtime.storage.store import Store
from components.training.checkpoint import copy_to_host, read_checkpoint, write_host_copy
from components.training.learner import Learner
from components.training.parallel import ALONE
from components.training.run_folder import fetch_once, upload_folder
from tests.benchmarks.interleaving import Row, interleaved, raced

SIZES: dict[str, Any] = {"resolution": 32, "model_channels": 128, "channel_mult": (1, 2, 2), "num_res_blocks": 3}
SIZES |= {"attention_resolutions": (16,), "num_heads": 4}
NAME = "step-000000001"


def rows(rounds: int) -> list[Row]:
    """Seconds until a checkpoint is stored, seconds to load it again."""
    config = OptimizationConfig(total_steps=100, global_batch_size=8, learning_rate=1e-4, ema_decay=0.0)
    learner = Learner(UNet(**SIZES), config=config, worker=ALONE)
    for parameter in learner.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.update(1)  # AdamW's moments
    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": Ours(learner, Path(folder)), "peer": Peer(learner, Path(folder))}
        measured = {
            name: interleaved({side: getattr(each, name) for side, each in sides.items()}, rounds=rounds, warm_up=1)
            for name in ("stored", "loaded")
        }
    return [raced(f"checkpoint_{name}", times) for name, times in measured.items()]


class Ours:
    """The product's steps on a local store."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        self.learner, self.run, self.scratch = learner, Store(str(folder / "ours")), folder / "scratch"

    def state(self) -> dict[str, Any]:
        """As of every task with one network."""
        return {"weights": self.learner.weights(), "learner": self.learner.progress()}

    def stored(self) -> None:
        """Copies, writes, hashes and sends."""
        self.run.delete_folder()
        write_host_copy(self.scratch / NAME, copy_to_host(self.state(), step=1))
        upload_folder(self.scratch / NAME, self.run, NAME)
        shutil.rmtree(self.scratch)

    def loaded(self) -> None:
        """Fetches, verifies, reads and restores."""
        place = Path(tempfile.mkdtemp(dir=self.scratch.parent))
        _, state = read_checkpoint(partial(fetch_once, self.run, NAME, place=place))
        self.learner.restore(state["weights"], state["learner"])
        shutil.rmtree(place)


class Peer:
    """DCP's own functions on the same disk."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        self.learner, self.folder = learner, folder / "dcp"

    def state(self) -> dict[str, Any]:
        """By DCP's own names."""
        model, optimizer = get_state_dict(self.learner.network, self.learner.optimizer)
        return {"model": model, "optimizer": optimizer}

    def stored(self) -> None:
        """Saves while training waits."""
        shutil.rmtree(self.folder, ignore_errors=True)
        dcp.save(self.state(), checkpoint_id=self.folder, no_dist=True)

    def loaded(self) -> None:
        """Reads into tensors that are there, and restores."""
        state = self.state()
        dcp.load(state, checkpoint_id=self.folder, no_dist=True)
        own = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.learner.network, self.learner.optimizer, **own)
