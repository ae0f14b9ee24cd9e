"""Every measurement of `make bench-gpu`: ours beside peers on one GPU, eager and compiled; a table, and bench-gpu.json.

Both sides of a row take turns in one run: a few steps of each between two waits for the GPU, medians of rounds. MFU
is of what a side's own network needs (`components.training.step_model`) and the card's dense peak in bf16
(`components.training.reporting`). Memory is the most that a side had at once, with its weights, while it warmed up.
"""

import platform
import shlex
import sys
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from components.models.devices import state_products
from components.runtime.execution import Resources
from components.training.reporting import GIGABYTE, peak_flops, peak_memory
from pipelines.planning.profiles import GPUS, Cluster, gpu_of
from pipelines.planning.step_time import step_time
from tests.benchmarks.gpu import diffusion, tokens, vqgan
from tests.benchmarks.gpu.case import Case, Side
from tests.benchmarks.interleaving import Step, interleaved
from tests.benchmarks.run import keep
from tests.evidence import REPOSITORY, Row, facts

CASES = {
    "unet_step": diffusion.unet_step,
    "dit_step": diffusion.dit_step,
    "vqgan_step": vqgan.vqgan_step,
    "prior_step": tokens.prior_step,
    "decoding": tokens.decoding,
    "sampling": diffusion.sampling,
}
RESULT = "bench-gpu.json"
PROVES = ("components/models/losses", "components/models", "components/sampling", "components/training")
SEED = 0
WARM_UP = 3
PACKAGES = ("torch", "diffusers", "transformers")


def row_of(case: Case, device: torch.device, *, compiled: bool, rounds: int) -> Row:
    """What both sides of a case were measured to be."""
    made = {name: warmed_up(side, device, compiled) for name, side in (("ours", case.ours), ("peer", case.peer))}
    steps = {name: partial(in_a_row, step, case.in_a_row) for name, (step, _) in made.items()}
    times = interleaved(steps, rounds=rounds, warm_up=0, wait=partial(wait_for, device))
    row = {name: times[name][0] / case.in_a_row for name in times}
    row |= {"ratio": row["ours"] / row["peer"], "name": f"{case.name}_compiled" if compiled else case.name}
    row |= {f"memory_gb_{name}": peak / GIGABYTE for name, (_, peak) in made.items()}
    for name, side in (("ours", case.ours), ("peer", case.peer)):
        row |= used(side.flops / row[name], name, device)
    if compiled and device.type == "cuda":
        row |= modeled(case, torch.cuda.get_device_name(device))
    return row | {"unit": "s", "samples": case.samples}


def modeled(case: Case, card: str) -> dict[str, float]:
    """Seconds of our step on a card as `cascade plan` models them; {} for an unknown card, or what is no training."""
    name = gpu_of(card)
    if name is None or case.model is None:
        return {}
    alone = Cluster(cpus=1, gpus=1, gpu=GPUS[name])
    return {"modeled": step_time(case.model, Resources(gpus_per_worker=1), alone, flops=case.ours.flops).seconds}


def used(flops_per_second: float, side: str, device: torch.device) -> dict[str, float]:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    found = {f"tflops_{side}": flops_per_second / 1e12}
    return found if peak is None else found | {f"mfu_{side}": flops_per_second / peak}


def warmed_up(side: Side, device: torch.device, compiled: bool) -> tuple[Step, float]:
    """A side's step, and the most bytes that it had while it was made and warmed up."""
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    step = side.make(device, compiled)
    for _ in range(WARM_UP):
        step()
    wait_for(device)
    return step, peak_memory(device) - before


def in_a_row(step: Step, count: int) -> None:
    for _ in range(count):
        step()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    versions = {"cuda": torch.version.cuda, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    return {"card": about.name, "memory_gb": about.total_memory / GIGABYTE, "versions": versions}


def table(rows: list[Row]) -> Table:
    result = Table("name", "samples", "ours, s", "peer, s", "ours / peer", "MFU ours, peer", "GB ours, peer")
    for row in rows:
        mfu = ", ".join(f"{row[key]:.1%}" for key in ("mfu_ours", "mfu_peer") if key in row)
        memory = ", ".join(f"{row[key]:.1f}" for key in ("memory_gb_ours", "memory_gb_peer"))
        numbers = [f"{row[key]:.4g}" for key in ("ours", "peer", "ratio")]
        result.add_row(row["name"], str(row["samples"]), *numbers, mfu or "-", memory)
    return result


def measured(names: list[str], device: torch.device, console: Console, *, rounds: int) -> list[Row]:
    """Rows of these cases. One that has no room on this card is left out, with a line that says so."""
    rows = []
    for name in names:
        case = CASES[name]()
        for compiled in (False, True):
            torch.compiler.reset()
            try:
                rows.append(row_of(case, device, compiled=compiled, rounds=rounds))
            except torch.cuda.OutOfMemoryError:
                console.print(f"{name}: no room on this card{' when compiled' if compiled else ''}; left out")
    return rows


def main(
    names: Annotated[list[str] | None, typer.Argument(help="unet_step decoding …; all if left out")] = None,
    rounds: int = 10,
) -> None:
    """Measure, print the table, and keep it in bench-gpu.json, where a row replaces what was measured of it before."""
    chosen, console = names or [*CASES], Console()
    if unknown := {*chosen} - {*CASES}:
        raise typer.BadParameter(f"no case {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    if not torch.cuda.is_available():
        line = "no GPU that torch can use: nothing is measured, and bench-gpu.json stays as it is"
        return console.print(line, soft_wrap=True)
    device = torch.device("cuda", torch.cuda.current_device())
    state_products("bf16")
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    rows = measured(chosen, device, console, rounds=rounds)
    command = shlex.join(["python", "-m", "tests.benchmarks.gpu.run", *(names or []), "--rounds", str(rounds)])
    about = facts(sys.modules[__name__], machine=machine(device)) | {"command": command}
    keep(REPOSITORY / RESULT, [row | about for row in rows], all_anew=not names)
    console.print(table(rows))


def application() -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return app


if __name__ == "__main__":
    application()()
