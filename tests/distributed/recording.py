"""A recorder that writes what it is told to a file, from whichever process."""

import json
import os
from pathlib import Path
from typing import Any


class FileRecorder:
    """Appends one JSON line a call; picklable."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)  # no path may cross to a worker, though these share a disk

    @property
    def path(self) -> Path:
        return Path(self._file)

    def progress(self, stage: str, **values: Any) -> None:
        self._write("progress", stage, values)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self._write("metrics", stage, {"step": step, **values})

    def image(self, stage: str, step: int, name: str, png: bytes) -> None:
        self._write("image", stage, {"step": step, "name": name, "bytes": len(png)})

    def text(self, stage: str, name: str, content: str) -> None:
        self._write("text", stage, {"name": name})

    def warning(self, stage: str, line: str) -> None:
        self._write("warning", stage, {"line": line})

    def lines(self, kind: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        return [line for line in found if line["kind"] == kind]

    def _write(self, kind: str, stage: str, values: dict[str, Any]) -> None:
        line = json.dumps({"kind": kind, "stage": stage, "pid": os.getpid(), **values})
        with open(self.path, "a") as file:
            file.write(line + "\n")
