"""Training loops of accelerate and of Lightning around the same small network: `python loops.py HOW`.

Prints JSON for each: wall-clock and CPU seconds of a step in the middle of a training. Each loop does what ours does:
AdamW by a schedule, a clipped gradient, a line of metrics at every `log_every` steps.
"""

import json
import logging
import sys
import time
import warnings
from typing import Any

import lightning
import torch
from accelerate import Accelerator
from torch import Tensor, nn

Marks = list[tuple[float, float]]  # wall-clock and CPU seconds


def make_network(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def make_optimizer(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)


def batches(how: dict[str, int]) -> list[Tensor]:
    return [torch.randn(how["batch"], how["width"])] * how["steps"]


def mark() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def by_accelerate(how: dict[str, int]) -> Marks:
    accelerator, network = Accelerator(cpu=True), make_network(how["width"], how["layers"])
    optimizer, schedule = make_optimizer(network, how["steps"])
    loader = torch.utils.data.DataLoader(batches(how), batch_size=None)
    network, optimizer, schedule, loader = accelerator.prepare(network, optimizer, schedule, loader)
    marks = []
    for step, batch in enumerate(loader):
        if step in (how["warm_up"], how["steps"] - 1):
            marks.append(mark())
        with accelerator.accumulate(network):
            loss = network(batch).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % how["log_every"] == 0:
            accelerator.log({"loss": loss.item()}, step=step)
    return marks


class Module(lightning.LightningModule):
    """The network as Lightning takes it."""

    def __init__(self, how: dict[str, int]) -> None:
        super().__init__()
        self.how, self.network = how, make_network(how["width"], how["layers"])
        self.marks: Marks = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index in (self.how["warm_up"], self.how["steps"] - 1):
            self.marks.append(mark())
        loss = self.network(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, schedule = make_optimizer(self.network, self.how["steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_lightning(how: dict[str, int]) -> Marks:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        log_every_n_steps=how["log_every"],
        enable_model_summary=False,
        **quiet,
    )
    module = Module(how)
    trainer.fit(module, torch.utils.data.DataLoader(batches(how), batch_size=None))
    return module.marks


def main(how: str) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    numbers = json.loads(how)
    steps, told = numbers["steps"] - 1 - numbers["warm_up"], {}
    for name, loop in (("accelerate", by_accelerate), ("lightning", by_lightning)):
        (wall, cpu), (wall_end, cpu_end) = loop(numbers)
        told[name] = [(wall_end - wall) / steps, (cpu_end - cpu) / steps]
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
