"""Independent pieces of work on Ray Data, a task for each, and records of earlier tries' pieces."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.data

from components.data.errors import DataError, ShardError, SourceError
from components.runtime.pool import portable
from components.runtime.storage.kept_parts import Look, Record, look_at, recorded_parts
from components.runtime.storage.store import Store, StoreError

OWN_ERRORS = {error.__name__: error for error in (DataError, ShardError, SourceError, StoreError)}
Warn = Callable[[str], None]  # shows a line to the user
WARN: Warn = logging.getLogger(__name__).warning
Work = Callable[[int, str], str]  # number of the piece, its description -> its result; picklable


def run_pieces(work: Work, pieces: Sequence[str], *, num_cpus: float) -> Iterator[tuple[int, str]]:
    """Yields (number, result) of each piece as tasks finish.

    Raises this package's own errors as the task raised them, without a remote traceback around the line.
    """

    def run_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"number": row["number"], "error": "", "content": work(row["number"], row["content"])}
        except tuple(OWN_ERRORS.values()) as error:
            return {"number": row["number"], "error": type(error).__name__, "content": str(error)}

    if not pieces:
        return
    _keep_off_the_terminal()
    portable(work, what="what reads the source")
    rows = [{"number": number, "content": piece} for number, piece in enumerate(pieces)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run_row, num_cpus=num_cpus)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for row in dataset.iter_rows():
        if row["error"]:
            raise OWN_ERRORS[row["error"]](row["content"])
        yield row["number"], row["content"]


@dataclass(frozen=True)
class PartReader:
    """Reads a part: name and recipe in, on two lines, the part's `Look` (JSON) out."""

    files: Store

    def __call__(self, number: int, content: str) -> str:
        part, _, recipe = content.partition("\n")
        return look_at(self.files, part, recipe=recipe).model_dump_json()


def whole_parts(recipes: Mapping[str, str], *, files: Store, num_cpus: float, warn: Warn) -> dict[str, Record]:
    """Records of the parts that an earlier try left whole in `files`; all their files are read.

    Args:
        recipes: name of a part -> digest of all that decides it, "" where the stage's key alone does.
        num_cpus: logical CPUs of the reading tasks.
        warn: receives a line for each damaged part, which has to be made again.
    """
    names = sorted(recorded_parts(files) & recipes.keys())
    records = {}
    pieces = [f"{name}\n{recipes[name]}" for name in names]
    for number, content in run_pieces(PartReader(files), pieces, num_cpus=num_cpus):
        look = Look.model_validate_json(content)
        if look.record is not None:
            records[names[number]] = look.record
        elif look.damage:
            warn(f"{look.damage}; it is made again")
    return records


def _keep_off_the_terminal() -> None:
    """Leaves Ray Data's log lines to the session's `ray-data.log`; failures are raised anyway."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.CRITICAL)
