"""A recorder that writes what happens to a file, from whichever process."""

import json
import os
from pathlib import Path
from typing import Any

from components.runtime import events


class FileRecorder(events.Recorder):
    """Appends one JSON line an event; picklable."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)  # no path may cross to a worker, though these share a disk

    @property
    def path(self) -> Path:
        return Path(self._file)

    def emit(self, event: events.Event) -> None:
        """Bytes are written as how many they are, the values of metrics by their names."""
        said = event._asdict()
        said |= said.pop("values", {}) | ({"png": len(said["png"])} if "png" in said else {})
        line = json.dumps({"kind": type(event).__name__.lower(), "pid": os.getpid(), **said})
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        return [line for line in found if line["kind"] == kind]
