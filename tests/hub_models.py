"""A server that takes the files of a model as the Hugging Face Hub does, each in the commit itself."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from tests.hub_server import SHA
from tests.waiting import in_thread


class Pushed(NamedTuple):
    endpoint: str
    files: dict[str, bytes]  # of all repositories, OWNER/NAME/PATH
    tokens: list[str]


@contextmanager
def model_hub(*, refuses: bool = False) -> Iterator[Pushed]:
    """A hub without models; with `refuses` it knows nobody's token."""
    files: dict[str, bytes] = {}
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer({"id": "owner/name", "sha": SHA, "siblings": [], "private": False})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            tokens.append(self.headers.get("Authorization", ""))
            parts = self.path.split("?")[0].split("/")
            if refuses:
                self.answer({"error": "Invalid credentials"}, 401)
            elif self.path == "/api/repos/create":
                made = json.loads(body)
                name = "/".join([made["organization"], made["name"]] if made.get("organization") else [made["name"]])
                self.answer({"url": f"{endpoint}/{name}"})
            elif parts[-1] == "validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "preupload" in parts:
                wanted = [each["path"] for each in json.loads(body)["files"]]
                self.answer(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]}
                )
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        place = "/".join([*parts[3:5], line["value"]["path"]])
                        files[place] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{endpoint}/owner/name/commit/{SHA}", "commitOid": SHA})

        def answer(self, content: dict, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Tests read what was pushed, not the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with in_thread(server):
        yield Pushed(endpoint, files, tokens)
