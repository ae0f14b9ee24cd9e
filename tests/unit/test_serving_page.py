"""Laws of the page's files: nothing but them is served, with headers that let nothing else into a browser."""

import json
import re

import pytest
from fastapi.testclient import TestClient

from components.sampling.requests import form_choices, form_fields
from components.serving.app import FIELDS_MODULE, PAGE, build_app
from components.serving.middleware import HEADERS
from tests.serving_backend import settings_of

FILES = sorted(path.name for path in PAGE.iterdir())


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(build_app({}, settings_of({"tiny": 0})), base_url="http://localhost")


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_folder_is_served_as_what_it_is(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (PAGE / name).read_bytes()
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["Content-Type"].startswith(kind[name.rpartition(".")[2]])
    for header, value in (HEADERS | {"Cache-Control": "no-cache"}).items():
        assert answer.headers[header] == value


def test_the_index_is_the_address_itself(client: TestClient) -> None:
    assert client.get("/").content == client.get("/page/index.html").content
    assert client.head("/").headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")


@pytest.mark.parametrize(
    "name", ["app.py", "%2e%2e%2fapp.py", "%2fetc%2fpasswd", "..%2f..%2fserving%2fapp.py", "no.js", "", "%00"]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_a_file_that_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    for header in (*HEADERS, "ETag", "Cache-Control"):
        assert again.headers[header] == first.headers[header]
    assert client.get("/page/main.js", headers={"If-None-Match": '"another"'}).status_code == 200


def test_the_page_names_no_other_host_and_has_no_script_or_style_in_its_html() -> None:
    for name in FILES:
        text = (PAGE / name).read_text()
        addresses = [each for each in re.findall(r"https?://[^\s\"'`)]+", text) if each != "http://www.w3.org/2000/svg"]
        assert addresses == [], name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text), name


def test_the_page_is_served_what_a_request_may_say_as_a_module(client: TestClient) -> None:
    """A word that the page doesn't know, such as a new sampler, is one of its choices and never sent as another."""
    answer = client.get(FIELDS_MODULE)
    assert answer.headers["Content-Type"].startswith("text/javascript")
    values = [json.loads(line.partition(" = ")[2].removesuffix(";")) for line in answer.text.splitlines()]
    assert values == [form_fields(), form_choices()]
    assert "[...choices, [value, value]]" in (PAGE / "options.js").read_text()


def test_every_module_is_short_and_imports_files_that_exist() -> None:
    for name in (name for name in FILES if name.endswith(".js")):
        text = (PAGE / name).read_text()
        assert text.count("\n") <= 150, name
        assert {*re.findall(r'from "\./([^"]+)"', text)} <= {*FILES, FIELDS_MODULE.removeprefix("/page/")}, name
