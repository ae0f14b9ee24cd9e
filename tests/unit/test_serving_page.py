"""Laws of the page's files: nothing but them is served, with headers that let nothing else into a browser."""

import json
import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from components.sampling.requests import form_choices, form_fields
from components.serving.page import FIELDS, FOLDER, HEADERS, add_page, read_page

FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    add_page(app)
    return TestClient(app)


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_folder_is_served_as_what_it_is(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["Content-Type"].startswith(kind[name.rpartition(".")[2]])
    for header, value in HEADERS.items():
        assert answer.headers[header] == value


def test_the_index_is_the_address_itself(client: TestClient) -> None:
    assert client.get("/").content == client.get("/page/index.html").content
    assert client.head("/").headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")


@pytest.mark.parametrize("name", ["page.py", "%2e%2e%2fpage.py", "..%2f..%2fserving%2fpage.py", "no.js", "", "%00"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_a_file_that_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert client.get("/page/main.js", headers={"If-None-Match": '"another"'}).status_code == 200


def test_the_page_names_no_other_host_and_has_no_script_or_style_in_its_html() -> None:
    for name, file in read_page().items():
        text = file.body.decode()
        addresses = [each for each in re.findall(r"https?://[^\s\"'`)]+", text) if each != "http://www.w3.org/2000/svg"]
        assert addresses == [], name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text), name


def test_the_page_is_served_what_a_request_may_say_as_a_module(client: TestClient) -> None:
    """A word that the page doesn't know, such as a new sampler, is one of its choices and never sent as another."""
    lines = client.get(f"/page/{FIELDS}").text.splitlines()
    values = [json.loads(line.partition(" = ")[2].removesuffix(";")) for line in lines]
    assert values == [form_fields(), form_choices()]
    assert "includes(value)" in (FOLDER / "options.js").read_text()


def test_every_module_is_short_and_imports_files_that_exist() -> None:
    for name in (name for name in FILES if name.endswith(".js")):
        text = (FOLDER / name).read_text()
        assert text.count("\n") <= 150, name
        assert {*re.findall(r'from "\./([^"]+)"', text)} <= {*FILES, FIELDS}, name
