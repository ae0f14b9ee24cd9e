"""A server that takes the files of a model as the Hugging Face Hub does, each in the commit itself."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.hub_server import SHA
from tests.waiting import Answering, http_server


class Pushed(NamedTuple):
    endpoint: str
    files: dict[str, bytes]  # of all repositories, OWNER/NAME/PATH
    tokens: list[str]


@contextmanager
def model_hub(*, refuses: bool = False) -> Iterator[Pushed]:
    """A hub without models; with `refuses` it knows nobody's token."""
    files: dict[str, bytes] = {}
    tokens: list[str] = []

    class Handler(Answering):
        def do_GET(self) -> None:  # noqa: N802
            self.tell({"id": "owner/name", "sha": SHA, "siblings": [], "private": False})

        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            tokens.append(self.headers.get("Authorization", ""))
            parts = self.path.split("?")[0].split("/")
            if refuses:
                self.tell({"error": "Invalid credentials"}, 401)
            elif self.path == "/api/repos/create":
                made = json.loads(body)
                name = "/".join([made["organization"], made["name"]] if made.get("organization") else [made["name"]])
                self.tell({"url": f"{endpoint}/{name}"})
            elif parts[-1] == "validate-yaml":
                self.tell({"errors": [], "warnings": []})
            elif "preupload" in parts:
                wanted = [each["path"] for each in json.loads(body)["files"]]
                self.tell(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]}
                )
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        place = "/".join([*parts[3:5], line["value"]["path"]])
                        files[place] = base64.b64decode(line["value"]["content"])
                self.tell({"commitUrl": f"{endpoint}/owner/name/commit/{SHA}", "commitOid": SHA})

        def tell(self, content: dict, status: int = 200) -> None:
            self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    with http_server(Handler) as endpoint:
        yield Pushed(endpoint, files, tokens)
