"""Memory of a node's processes, looked at once a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.nodes import Node, title_of
from tests.waiting import watching

SECONDS = 1.0
IDLE = "ray::IDLE"


class Memory:
    """Peaks of a node's processes.

    Resident memory (RSS) of one process counts the pages of shared libraries that others have as well; the sum over a
    node counts each page once (PSS: shared by those who have it), which is what a machine must have.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.titles: dict[int, str] = {}
        self.peaks: dict[int, int] = {}  # bytes, RSS
        self.total = 0  # peak of the sum of PSS, bytes

    def look(self) -> None:
        total = 0
        for process in self.node.processes():
            sizes = memory_of(process.pid)
            if sizes is None:
                continue
            total += sizes[1]
            self.peaks[process.pid] = max(self.peaks.get(process.pid, 0), sizes[0])
            title = short(title_of(process))
            if (title and title != IDLE) or process.pid not in self.titles:  # a worker of Ray between two tasks
                self.titles[process.pid] = title
        self.total = max(self.total, total)

    def by_title(self) -> dict[str, int]:
        """Title -> the highest peak of the processes with it, bytes; the largest first."""
        found: dict[str, int] = {}
        for pid, title in self.titles.items():
            found[title] = max(found.get(title, 0), self.peaks[pid])
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@contextmanager
def watched(node: Node) -> Iterator[Memory]:
    """The memory of a node's processes while the context lasts."""
    memory = Memory(node)
    with watching(memory.look, pause=SECONDS):
        yield memory


def memory_of(pid: int) -> tuple[int, int] | None:
    """RSS and PSS of a process, bytes; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, psutil.Error):
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["Rss"], sizes["Pss"]


def short(title: str) -> str:
    """A process's title without paths and options: `ray::run_stage`, `full_cascade.py`, `raylet`."""
    words = [word for word in title.split() if not word.startswith("-")]
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]
    return Path(words[1] if "python" in Path(words[0]).name and len(words) > 1 else words[0]).name
