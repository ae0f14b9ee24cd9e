"""Independent pieces of work on Ray Data: one task for each, results as they are finished."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from components.data.errors import DataError, ShardError, SourceError
from components.pool import portable
from components.storage.store import StoreError

OWN_ERRORS = {error.__name__: error for error in (DataError, ShardError, SourceError, StoreError)}
Work = Callable[[int, str], str]  # number of the piece, its description -> its result; picklable


def run_pieces(work: Work, pieces: Sequence[str], *, num_cpus: float) -> Iterator[tuple[int, str]]:
    """(number, result) of each piece, in the order in which tasks finish.

    The errors of this package come back as they were raised, without a remote traceback around their one line.
    """

    def run_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"number": row["number"], "error": "", "content": work(row["number"], row["content"])}
        except tuple(OWN_ERRORS.values()) as error:
            return {"number": row["number"], "error": type(error).__name__, "content": str(error)}

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


def _keep_off_the_terminal() -> None:
    """Ray Data's log lines go to its own file alone, `ray-data.log` of the session; what fails is raised here."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.CRITICAL)
