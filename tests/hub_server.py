"""A server that answers as the Hugging Face Hub does, as far as its file system asks for one data set's files."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.waiting import Answering, http_server

SHA = "0123456789abcdef0123456789abcdef01234567"  # of the commit that `main` is


class Hub(NamedTuple):
    endpoint: str
    asked: list[str]  # requests
    sent: list[int]  # bytes of each answer


@contextmanager
def hub(folder: Path, repo: str) -> Iterator[Hub]:
    """A hub whose one data set `repo` holds the files of `folder`."""
    asked: list[str] = []
    sent: list[int] = []

    class Handler(Answering):
        def do_GET(self) -> None:  # noqa: N802
            path = unquote(urlsplit(self.path).path)
            asked.append(f"GET {path}")
            if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
                self.answer(json.dumps({"id": repo, "sha": SHA, "siblings": [], "private": False}).encode())
            elif path.startswith(f"/api/datasets/{repo}/tree/main"):
                below = path.removeprefix(f"/api/datasets/{repo}/tree/main").strip("/")
                recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() == "true"
                self.answer(json.dumps(listing(folder, below, recursive=recursive)).encode())
            elif path.startswith(f"/datasets/{repo}/resolve/main/"):
                self.send_file(folder / path.removeprefix(f"/datasets/{repo}/resolve/main/"))
            else:
                self.not_found("RepoNotFound")

        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"POST {self.path}")
            if not self.path.startswith(f"/api/datasets/{repo}/paths-info/main"):
                self.not_found("RepoNotFound")
                return
            kind = self.headers.get("Content-Type", "")
            paths = json.loads(body)["paths"] if "json" in kind else parse_qs(body.decode())["paths"]
            found = [entry(folder, folder / path) for path in paths if (folder / path).exists()]
            self.answer(json.dumps(found).encode())

        def send_file(self, file: Path) -> None:
            if not file.is_file():
                self.not_found("EntryNotFound")
                return
            data = file.read_bytes()
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if "Range" in self.headers else {}
            self.answer(data[start:stop], 206 if headers else 200, headers)

        def not_found(self, code: str) -> None:
            self.answer(b'{"error": "not found"}', 404, {"X-Error-Code": code})

        def answer(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            sent.append(len(data))
            super().answer(data, status, headers)

    with http_server(Handler) as endpoint:
        yield Hub(endpoint, asked, sent)


def listing(folder: Path, below: str, *, recursive: bool) -> list[dict]:
    place = folder / below
    paths = place.rglob("*") if recursive else place.glob("*")
    return [entry(folder, path) for path in sorted(paths)]


def entry(folder: Path, path: Path) -> dict:
    """One line of the hub's listing: files by their git ids."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
