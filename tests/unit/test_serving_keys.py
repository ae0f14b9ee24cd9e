"""Laws of who may ask: a key where there is one; else this machine's own programs and the service's own page alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.serving.app import build_app
from components.serving.settings import read_keys
from tests.serving_backend import HTTP, SmallBackend, serving, settings_of

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def keyed(backends: dict[str, SmallBackend]) -> Iterator[str]:
    with serving(*backends.values(), keys=KEYS, keys_required=True) as url:
        yield url


def asked(url: str, path: str = "/v1/models", **headers: str) -> int:
    return HTTP.get(url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}).status_code


@pytest.mark.parametrize("key", KEYS)
def test_each_of_several_keys_opens(keyed: str, key: str) -> None:
    assert asked(keyed, Authorization=f"Bearer {key}") == 200
    assert asked(keyed, Authorization=f"bearer  {key}") == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer first", "Bearer first-key,second-key", "Basic first-key", "first-key"]
)
def test_nothing_else_opens(keyed: str, header: str) -> None:
    answer = HTTP.get(keyed + "/v1/models", headers={"Authorization": header} if header else {})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not any(key in answer.text for key in KEYS)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/openapi.json", "/page", "/nowhere", "//v1/models"])
def test_without_a_key_nothing_is_told_of_what_it_protects(keyed: str, path: str) -> None:
    assert asked(keyed, path) == 401


@pytest.mark.parametrize("path", ["/healthz", "/", "/page/page.css"])
def test_the_page_needs_no_key(keyed: str, path: str) -> None:
    assert asked(keyed, path) == 200


def test_with_a_key_any_name_of_the_service_and_any_page_may_ask(keyed: str) -> None:
    headers = {"Host": "images.example", "Origin": "https://other.example", "Sec_Fetch_Site": "cross-site"}
    assert asked(keyed, Authorization="Bearer first-key", **headers) == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"])
def test_this_machine_is_answered_by_each_of_its_names(address: str, host: str) -> None:
    assert asked(address, Host=host) == 200


@pytest.mark.parametrize(
    "host", ["images.example", "localhost.images.example", "10.0.0.1:8000", "127.0.0.1.images.example", "[", "", "a b"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/", "/healthz"])
def test_a_name_that_was_made_to_point_here_is_not(address: str, host: str, path: str) -> None:
    """DNS rebinding."""
    assert asked(address, path, Host=host) in (400, 403)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost:8000"}, 200),
        ({"Origin": "http://localhost:8000", "Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://images.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_a_page_of_another_site_is_not_answered(address: str, headers: dict[str, str], status: int) -> None:
    assert asked(address, Host="localhost:8000", **headers) == status


def test_a_link_from_anywhere_opens_the_page(address: str) -> None:
    assert asked(address, "/", Host="localhost:8000", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 200


def test_keys_stand_in_the_environment_or_in_a_file_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("third\nfourth, fifth\n\n")
    assert read_keys({"CASCADE_API_KEYS": " first ,second,"}) == ("first", "second")
    assert read_keys({"CASCADE_API_KEYS": "first", "CASCADE_API_KEYS_FILE": str(file)}) == (
        *("first", "third", "fourth", "fifth"),
    )
    assert read_keys({}) == ()


def test_keys_that_could_never_fit_are_refused_without_being_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a key must be of letters, digits and signs") as caught:
        read_keys({"CASCADE_API_KEYS": "with space, schlüssel"})
    assert "schlüssel" not in str(caught.value)
    with pytest.raises(ValueError, match=r"CASCADE_API_KEYS_FILE: the file can't be read \(FileNotFoundError\)"):
        read_keys({"CASCADE_API_KEYS_FILE": str(tmp_path / "none")})


def test_a_service_that_needs_keys_does_not_start_without(backends: dict[str, SmallBackend]) -> None:
    with pytest.raises(ValueError, match="needs keys: set CASCADE_API_KEYS"):
        build_app(backends, settings_of(backends, keys_required=True))
