"""The service's page: static files of this folder, and headers that let nothing else into the browser."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, HTTPException, Request, Response

from components.sampling.requests import form_choices, form_fields

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
FIELDS = "fields.js"  # written here: the controls of a request's options
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:"),
    *("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"),
)
HEADERS = {
    "Content-Security-Policy": "; ".join(POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again: a new version of the service has a new page at once
}


class PageFile(NamedTuple):
    body: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """The files by name; nothing else is ever served, whatever name is asked for."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    files[FIELDS] = fields_module(form_fields(), form_choices()).encode()
    etags = {name: f'"{hashlib.sha256(body).hexdigest()[:32]}"' for name, body in files.items()}
    return {name: PageFile(body, TYPES[Path(name).suffix], etags[name]) for name, body in files.items()}


def fields_module(fields: object, choices: object) -> str:
    """Returns the page's module of what there is to set: `OPTIONS` of a request, `CHOICES` of a stage's settings."""
    return f"export const OPTIONS = {json.dumps(fields)};\nexport const CHOICES = {json.dumps(choices)};\n"


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files at `/page/NAME`; no key is asked for them."""
    files = read_page()

    def answer(name: str, request: Request) -> Response:
        file = files.get(name)
        if file is None:
            raise HTTPException(404, f"the page has no file {name[:80]!r}")
        headers = HEADERS | {"ETag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)

    async def index(request: Request) -> Response:
        return answer(INDEX, request)

    async def named(name: str, request: Request) -> Response:
        return answer(name, request)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{name}", named, methods=["GET", "HEAD"], include_in_schema=False)
