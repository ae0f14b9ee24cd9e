"""A server that answers as the Hugging Face Hub does, as far as its file system asks for one data set's files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.waiting import in_thread

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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
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

        def do_POST(self) -> None:
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

        def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            sent.append(len(data))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Tests read what was asked, not the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with in_thread(server):
        yield Hub(f"http://127.0.0.1:{server.server_port}", asked, sent)


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
