"""`--profile-steps 20:25`: which steps of each training torch.profiler records, and where their traces are."""

import re

from components.configuration.usage import UsageError
from components.runtime.execution import Profiling
from components.runtime.storage.store import Store
from pipelines.planning.preflight import trainings
from pipelines.workflow import Workflow

MOST_STEPS = 100  # a step leaves some MB in memory and in the file
TRACES = "traces"  # folder of a run


def parse_steps(text: str, *, workflow: Workflow, folder: str) -> Profiling:
    """Raises UsageError, in one line, for what are no steps that some training of the workflow takes."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--profile-steps {text}: write it as FIRST:LAST, 20:25 for steps 20 to 25; the first is 1")
    if last - first >= MOST_STEPS:
        raise UsageError(f"--profile-steps {text}: at most {MOST_STEPS} steps, a trace grows with each")
    steps = {name: config.optimization.total_steps for name, config in trainings(workflow).items()}
    if max(steps.values(), default=0) < first:
        taken = ", ".join(f"{name} {number}" for name, number in steps.items()) or "there is none"
        raise UsageError(f"--profile-steps {text}: no training takes step {first} (steps: {taken})")
    return Profiling(first_step=first, last_step=last, folder=folder)


def traces_of(root: Store, run: str) -> list[str]:
    """URLs of the traces that a run has left."""
    folder = root.join("runs", run, TRACES)
    return [folder.url(file.path) for file in folder.list()]
