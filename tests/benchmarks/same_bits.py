"""Hashes of what the code computes, so that a change of its layout can show that it changed no bit.

`python -m tests.benchmarks.same_bits --out before.json tiny samples` records parts, `--compare before.json after.json`
prints each record that differs. The parts: `tiny`, weights and averages of tiny trainings of every kind; `samples`,
images of every kind of generator; `openapi`, the description of the HTTP API; `smoke`, what the stages of that recipe
leave; `demo`, the same of the demo with a fifth of its steps. Records have names of their own, no modules' or files'.
Equal bits are promised on one machine with one version of torch alone, so both stand beside the records.
"""

import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from components.sampling.cascade import Cascade, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.loop import Task
from pipelines.recipes.catalog import load_recipe
from tests import tiny_autoencoders, tiny_cascade, tiny_diffusion_branches, tiny_generators, tiny_text_image
from tests.evidence import REPOSITORY, Row, commit, machine
from tests.serving_documents import openapi_text
from tests.tiny_palette import write_palette
from tests.tiny_training import DIFFUSIONS, KINDS, batches, config_of, make_task, pixel_config

STEPS = 20  # of a tiny training: by then every loss has begun
SHARE = 5  # the demo takes one of so many steps
IN_STEPS = ("total_steps", "warmup_steps", "checkpoint_every", "sample_every", "discriminator_start")
SAMPLERS = ("ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "heun", "euler")
TASKS = ("colorization", "inpainting", "uncropping", "super_resolution", "jpeg")
IMAGES = 3  # of each request, by seed

Records = dict[str, str]


def hash_of(tensors: Mapping[str, Tensor | np.ndarray]) -> str:
    """The sha256 of names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = torch.as_tensor(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tiny_trainings() -> Iterator[tuple[str, Any, Callable[[Any], Task]]]:
    """Name, configuration and what makes the task: every kind of task, diffusion variant and autoencoder."""
    for kind in dict.fromkeys((*KINDS, *DIFFUSIONS, "gan")):
        yield kind, config_of(kind), make_task
    for name in tiny_autoencoders.RECIPES:
        yield name, tiny_autoencoders.config_of(name), make_task
    for name, (configuration, task) in tiny_text_image.TEXT_IMAGE.items():
        yield name, configuration(), task
    yield "power average", config_of("prior", ema="power", ema_sigma_rel=0.07), make_task
    for network in ("pixelcnn", "row_lstm"):
        yield f"{network} of tokens", pixel_config(network=network, resolution=None), make_task
    for how in ("cross_attention", "spatial_transformer"):
        yield how, config_of("base", text_conditioning=how), make_task
    decoder = tiny_text_image.decoder_config(cond_drop="independent")
    yield "decoder of frozen encoders", decoder, tiny_text_image.prior_task


def tiny() -> Records:
    """Weights and averages after a few steps."""
    records = {}
    for name, config, make in tiny_trainings():
        task, stream = make(config), batches(config, to_batch)
        for step in range(1, STEPS + 1):
            task.train_step(next(stream), step)
        records[name] = hash_of(task.state_dict()["weights"])
    return records


def requested(write: Callable[[Path], Path], requests: Mapping[str, Mapping[str, Any]]) -> Records:
    """Images of a cascade for each named request and seed."""
    with tempfile.TemporaryDirectory() as folder:
        cascade = Cascade.load(write(Path(folder)))
        records = {}
        for name, fields in requests.items():
            images = cascade.sample([Request(seed=seed, **fields) for seed in range(IMAGES)])
            records[name] = hash_of({"images": np.stack(images)})
        return records


def samples() -> Records:
    """Images of all kinds of generators with fixed random weights: diffusion, tokens, GAN, VAE, pixels, translate."""
    text, label = {"prompt": "red apple"}, {"label": tiny_cascade.CLASSES[1]}
    asked: dict[str, dict[str, Any]] = {
        f"diffusion by text, {sampler}": {"generator": "diffusion", "sampler": sampler, "guidance_scale": 2.0, **text}
        for sampler in SAMPLERS
    }
    asked["diffusion by class"] = {"generator": "diffusion", **label}
    asked["diffusion by class and text"] = {"generator": "diffusion", "steps": 6, **text, **label}
    own = (("base", "eta", 0.5), ("base", "threshold", "dynamic"), ("base", "guidance_rescale", 0.7))
    asked["diffusion with settings of its own"] = asked["diffusion by text, ddim"] | {"sampling": own}
    asked["tokens by text"] = {"generator": "tokens", "guidance_scale": 2.0, "top_k": 20, **text}
    asked["tokens by class"] = {"generator": "tokens", "temperature": 0.8, "top_p": 0.9, **label}
    asked["best of tokens"] = {"generator": "tokens", "best_of": 3, **text}
    records = requested(tiny_cascade.write_cascade, asked)
    of_branch = {"imagen": text, "dalle2": text} | {"classifier_guided": {**label, "classifier_scale": 3.0}}
    for name, write in tiny_diffusion_branches.GENERATORS.items():
        records |= requested(write, {f"diffusion, {name}": of_branch.get(name, label)})
    for name, fields in {"gan": {**label, "truncation": 0.7}, "vae": {}, "pixels": label}.items():
        records |= requested(partial(tiny_generators.lone, name), {name: fields})
    for name, prior in tiny_generators.PRIORS.items():
        guided = {f"tokens of {name}": {**label, "guidance_scale": 2.0}}
        records |= requested(partial(tiny_generators.token_branch, prior), guided)
    larger = {"tokens of a larger image": {**label, "size": (16, 32)}}
    records |= requested(partial(tiny_generators.token_branch, tiny_generators.PRIORS["transformer"]), larger)
    given = {"tokens after a condition image": {"condition": drawn_png(16)}}
    records |= requested(tiny_generators.conditioned, given)
    masked = {"image": drawn_png(8), "mask": mask_png(8)}
    kept = {f"diffusion in a mask, {sampler}": {**masked, "sampler": sampler} for sampler in SAMPLERS}
    records |= requested(lone_base, kept)
    images = {task: {"image": drawn_png(8 if task == "super_resolution" else 16)} for task in TASKS}
    masks = {task: {"mask": mask_png(16)} for task in ("inpainting", "uncropping")}
    translated = {f"translate, {task}": {"task": task, **images[task], **masks.get(task, {})} for task in TASKS}
    return records | requested(write_palette, translated)


def lone_base(folder: Path) -> Path:
    base = tiny_diffusion_branches.base(folder)
    return compose(folder / "cascade", base=base, sampling={"base": tiny_cascade.FEW})


def drawn_png(side: int) -> bytes:
    return encode_png(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))


def mask_png(side: int) -> bytes:
    """White in the lower right quarter."""
    hidden = np.zeros((side, side), np.uint8)
    hidden[side // 2 :, side // 2 :] = 255
    return encode_png(hidden)


def run_recipe(recipe: str, settings: Iterable[str]) -> tuple[Records, Row]:
    """Run a recipe by the command in a folder of its own. Returns hashes and seconds, both by stage."""
    with tempfile.TemporaryDirectory(prefix="same-bits-") as place:
        command = [str(Path(sys.executable).with_name("cascade")), "run", "--recipe", recipe, "--promote", "never"]
        command += ["--storage", "runs", "--tracking", f"sqlite:///{place}/mlflow.db"]
        command += [part for setting in settings for part in ("--set", setting)]
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": paths}, check=True)
        (plan,) = Path(place).glob("runs/runs/*/plan.json")
        stages = {stage["name"]: stage for stage in json.loads(plan.read_text())["stages"]}
        folders = {name: Path(place) / "runs" / "stages" / name / stage["key"] for name, stage in stages.items()}
        hashes = {name: hash_of_artifact(folder) for name, folder in folders.items()}
        seconds = {name: round(stage["finished"] - stage["started"], 1) for name, stage in stages.items()}
    return {name: own for name, own in hashes.items() if own is not None}, {"seconds": seconds}


def hash_of_artifact(folder: Path) -> str | None:
    """One hash of all weights and all arrays of samples that a stage left; None for what is neither."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [folder / entry["path"] for entry in manifest["files"]]
    hashes = [hash_of(load_file(file)) for file in files if file.suffix == ".safetensors"]
    if manifest["kind"] == "samples":
        hashes += [hash_of(dict(np.load(file))) for file in files if file.suffix == ".npz"]
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest() if hashes else None


def fewer_steps(tree: Any, path: str = "") -> Iterator[str]:
    """Settings that give each training of a recipe its share of the steps, with all that is counted in steps."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in parts:
        if name in IN_STEPS:
            yield f"{path}{name}={max(1, value // SHARE)}"
        yield from fewer_steps(value, f"{path}{name}.")


def record(part: str) -> Row:
    """The records of a part, and what they are evidence of."""
    torch.manual_seed(0)
    more: Row = {}
    started, cpu = time.perf_counter(), cpu_seconds()
    if part == "smoke":
        records, more = run_recipe("smoke", [])
    elif part == "demo":
        records, more = run_recipe("openmoji", fewer_steps(load_recipe("openmoji", []).model_dump(mode="json")))
    elif part == "openapi":
        more = {"document": json.loads(openapi_text())}
        records = {part: hashlib.sha256(json.dumps(more["document"], sort_keys=True).encode()).hexdigest()}
    else:
        torch.set_num_threads(1)
        records = tiny() if part == "tiny" else samples()
    about = {"commit": commit(), "machine": machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    about |= {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu_seconds() - cpu, 1)}
    return about | more | {"records": records}


def cpu_seconds() -> float:
    """Of this process and of what it started and waited for."""
    return sum(os.times()[:4])


def compare(before: dict[str, Row], after: dict[str, Row]) -> bool:
    """Print each record that differs or is missing. Returns whether there is none."""
    sides = (before, after)
    hashes = [{(part, name): own for part in side for name, own in side[part]["records"].items()} for side in sides]
    names = sorted({*hashes[0], *hashes[1]})
    unequal = [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
    for name in unequal:
        missing = "missing before" if name not in hashes[0] else "missing after" if name not in hashes[1] else "differs"
        print(f"{': '.join(name)}: {missing}")
    for part in sorted({*before} & {*after}):
        if any(before[part][fact] != after[part][fact] for fact in ("machine", "torch", "threads")):
            print(f"{part}: recorded on another machine, with another torch or with other threads")
        if "document" in before[part]:
            texts = [json.dumps(side[part]["document"], indent=1).splitlines() for side in sides]
            for line in difflib.unified_diff(texts[0], texts[1], n=2, lineterm=""):
                print(line)
    print(f"{len(names) - len(unequal)} of {len(names)} equal")
    return not unequal


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="tiny samples openapi smoke demo; all if left out")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; parts that it has of before stay")] = None,
    compare_: Annotated[tuple[Path, Path] | None, typer.Option("--compare", help="two such files")] = None,
) -> None:
    """Record hashes of what is computed, or compare two records: exit 1 if they differ."""
    if compare_ is not None:
        before, after = (json.loads(path.read_text()) for path in compare_)
        raise typer.Exit(not compare(before, after))
    if out is None:
        raise typer.BadParameter("give --out FILE.json, or --compare BEFORE.json AFTER.json")
    every = ("tiny", "samples", "openapi", "smoke", "demo")
    if unknown := {*(parts or [])} - {*every}:
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    for part in parts or every:
        row = record(part)
        rows = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(rows | {part: row}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
