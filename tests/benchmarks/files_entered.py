"""Files of the repository that a reader passes: from a prompt to a PNG, from HTTP to a PNG, from `cascade run` to
`optimizer.step`. `python -m tests.benchmarks.files_entered` prints the lists.

All count the files on the call stacks at chosen points: of a request where the network is called and where the image
is encoded; of one over HTTP also where the API asks the model and where the replica's thread takes the job; of a
training at its hand-overs (the driver submits the stage, the stage starts Ray Train, a rank takes a step). Calls beside
the way, such as a schedule or a lookup, are not counted.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.testclient import TestClient
from typer.testing import CliRunner

from components.serving.app import build_app
from components.serving.deployment import RayBackend
from components.serving.middleware import GENERATIONS
from components.serving.replica import Model
from components.serving.settings import ServedModel, ServiceSettings
from pipelines.command.cli import app
from tests.tiny_cascade import write_cascade

ROOT = Path(__file__).resolve().parents[2]
REQUEST_POINTS = {("forward", "unet.py"), ("encode_png", "image_files.py")}
HOOK = """
import os, sys, threading

HAND_OVERS = {("_remote", "remote_function.py"), ("fit", "data_parallel_trainer.py"), ("step", "adam.py")}
told = set()


def hook(frame, event, arg):
    name = (frame.f_code.co_name, os.path.basename(frame.f_code.co_filename))
    if event != "call" or name not in HAND_OVERS:
        return
    files, caller = [], frame
    while caller is not None:
        files.append(os.path.relpath(caller.f_code.co_filename, ROOT))
        caller = caller.f_back
    own = tuple(file for file in files if file.startswith(("components/", "pipelines/")))
    if own and own not in told:
        told.add(own)
        with open(os.path.join(PLACE, f"{os.getpid()}-{len(told)}"), "w") as out:
            out.write("\\n".join([name[0], *own]))


sys.setprofile(hook)
threading.setprofile(hook)
"""


def own_file(frame: FrameType) -> str | None:
    """The repository's file that a function stands in, relative to the root; None for module bodies and others."""
    name = frame.f_code.co_filename
    if frame.f_code.co_name == "<module>" or not name.startswith((f"{ROOT}/components/", f"{ROOT}/pipelines/")):
        return None
    return os.path.relpath(name, ROOT)


def counting(entered: dict[str, None], points: set[tuple[str, str]]) -> Callable[..., None]:
    """A profiler's hook that adds the files on the stack at each of the points, the outermost first."""

    def hook(frame: FrameType | None, event: str, argument: object) -> None:
        code = frame.f_code if frame is not None else None
        if event != "call" or code is None or (code.co_name, Path(code.co_filename).name) not in points:
            return
        stack: list[str] = []
        while frame is not None:
            stack += [name] if (name := own_file(frame)) is not None else []
            frame = frame.f_back
        entered.update(dict.fromkeys(reversed(stack)))

    return hook


def from_prompt_to_png(folder: Path) -> list[str]:
    """Files on the stacks of `cascade sample --prompt` where the U-Net works and where its image becomes a PNG."""
    entered: dict[str, None] = {}
    options = ["sample", "--model", str(write_cascade(folder)), "--prompt", "red apple", "--count", "1"]
    sys.setprofile(counting(entered, REQUEST_POINTS))
    done = CliRunner().invoke(app, [*options, "--out", str(folder / "out")])
    sys.setprofile(None)
    assert done.exit_code == 0, done.output
    return list(entered)


class Handle:
    """A deployment's handle, of a replica in this process."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def options(self, **options: object) -> "Handle":
        return self

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self._model, name))


class Method:
    """A method of a replica as Ray Serve's handles have it, and its answer."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: object) -> "Method":
        self._answer = self._method(*arguments)
        return self

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._answer.__await__()

    def __anext__(self) -> Awaitable[Any]:
        return anext(self._answer)

    def cancel(self) -> None:
        """Does nothing: the job is over."""


def from_http_to_png(folder: Path) -> list[str]:
    """Files on the stacks of a request over HTTP: API, replica, its sampling thread, network and PNG."""
    entered: dict[str, None] = {}
    points = REQUEST_POINTS | {("lasting", "responses.py"), ("remote", "files_entered.py"), ("add", "replica.py")}
    served = ServedModel(name="tiny", source=str(write_cascade(folder)))
    settings = ServiceSettings(models=(served,), max_replicas=2)  # of several each has a thread, and asks no Ray
    threading.setprofile(counting(entered, points))
    model = Model(served, settings)
    backends = {"tiny": RayBackend(Handle(model))}
    client = TestClient(build_app(backends, settings), base_url="http://localhost")
    entered.clear()  # its generators are warm
    answer = client.post(GENERATIONS, json={"prompt": "red apple"})
    threading.setprofile(None)
    assert answer.status_code == 200, answer.text
    return list(entered)


def from_run_to_step(folder: Path) -> list[str]:
    """Files on the stacks from `cascade run` to the optimizer's step of the base."""
    (folder / "hook").mkdir()
    (folder / "told").mkdir()
    program = f"ROOT, PLACE = {str(ROOT)!r}, {str(folder / 'told')!r}\n{HOOK}"
    (folder / "hook" / "sitecustomize.py").write_text(program)
    few = ["total_steps=2", "warmup_steps=1", "checkpoint_every=2", "sample_every=2"]
    command = [str(Path(sys.executable).with_name("cascade")), "run", "--recipe", "smoke", "--until", "base"]
    command += [part for setting in few for part in ("--set", f"base.{setting}")]
    paths = os.pathsep.join([str(folder / "hook"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, check=True, stdout=subprocess.DEVNULL)
    stacks = [path.read_text().splitlines() for path in (folder / "told").iterdir()]
    found: dict[str, None] = {}
    for hand_over, last in (
        ("_remote", "pipelines/engine/execute.py"),
        ("fit", "components/training/launch.py"),
        ("step", "components/training/learner.py"),
    ):
        of_base = [files for name, *files in stacks if name == hand_over and files[0] == last]
        for file in reversed(min(of_base, key=len)):
            found[file] = None
    return list(found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for title, find in (
            ("from a prompt to a PNG", from_prompt_to_png),
            ("from HTTP to a PNG", from_http_to_png),
            ("to optimizer.step", from_run_to_step),
        ):
            (Path(place) / find.__name__).mkdir()
            files = find(Path(place) / find.__name__)
            print(f"{title}: {len(files)} files", *files, sep="\n  ")
