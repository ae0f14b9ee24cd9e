"""Laws of who may ask: a key where there is one; else this machine's own programs and the service's own page alone."""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from components.serving.app import build_app
from components.serving.keys import LOOK_SECONDS, Keyring, Rates, read_keys
from components.serving.settings import Limits
from tests.serving_backend import HTTP, SmallBackend, serving, settings_of
from tests.waiting import eventually

KEYS = ("first-key-of-thirty-two-signs...", "second-key-of-thirty-two-signs..")
GENERATION = {"prompt": "red apple", "label": "food", "seed": 5, "model": "tiny"}


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
    "header", ["", "Bearer", "Bearer first", f"Bearer {','.join(KEYS)}", f"Basic {KEYS[0]}", KEYS[0]]
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
    assert asked(keyed, Authorization=f"Bearer {KEYS[0]}", **headers) == 200


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
    first, *others = (letter * 32 for letter in "abcd")
    file.write_text("{}\n{}, {}\n\n".format(*others))
    assert read_keys({"CASCADE_API_KEYS": f" {first} ,{others[0]},"}) == (first, others[0])
    assert read_keys({"CASCADE_API_KEYS": first, "CASCADE_API_KEYS_FILE": str(file)}) == (first, *others)
    assert read_keys({}) == ()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("with space, schlüssel", "a key must be of letters, digits and signs"),
        (f"{KEYS[0]},{KEYS[1][:31]}", "CASCADE_API_KEYS: key 2 has 31 characters, and must have at least 32: make one"),
    ],
)
def test_keys_that_could_never_fit_or_be_guessed_are_refused_without_being_shown(keys: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_keys({"CASCADE_API_KEYS": keys})
    assert not any(key.strip() in str(caught.value) for key in keys.split(","))


def test_a_file_of_keys_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CASCADE_API_KEYS_FILE: the file can't be read \(FileNotFoundError\)"):
        read_keys({"CASCADE_API_KEYS_FILE": str(tmp_path / "none")})


def test_a_service_that_needs_keys_does_not_start_without(backends: dict[str, SmallBackend]) -> None:
    with pytest.raises(ValueError, match="needs keys: set CASCADE_API_KEYS"):
        build_app(backends, settings_of(backends, keys_required=True))


def test_keys_change_while_the_service_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a mounted secret does: the new key opens, the one that is gone does not, and a broken file changes nothing."""
    file, clock = tmp_path / "keys", [0.0]
    monkeypatch.setattr("components.serving.keys.time.monotonic", lambda: clock[0])
    file.write_text(KEYS[0])
    ring = Keyring(lambda: read_keys({"CASCADE_API_KEYS_FILE": str(file)}))

    def known() -> list[bool]:
        clock[0] += LOOK_SECONDS
        return [ring.name_of(key) is not None for key in KEYS]

    assert known() == [True, False]
    file.write_text("\n".join(KEYS))
    assert [ring.name_of(key) is not None for key in KEYS] == [True, False], "not before the next look"
    assert known() == [True, True]
    file.write_text(KEYS[1])
    assert known() == [False, True]
    for _ in range(3):
        file.write_text("short")
        assert known() == [False, True]
    assert [record.message.partition(":")[0] for record in caplog.records] == ["CASCADE_API_KEYS_FILE"], "said once"
    assert "short" not in caplog.text
    file.write_text("")
    assert known() == [False, False]


def test_a_service_whose_last_key_is_gone_answers_nobody(
    backends: dict[str, SmallBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(KEYS)
    monkeypatch.setattr("components.serving.keys.LOOK_SECONDS", 0)
    client = TestClient(build_app(backends, settings_of(backends), read_keys=lambda: keys), base_url="http://localhost")
    header = {"Authorization": f"Bearer {KEYS[0]}"}
    assert client.get("/v1/models", headers=header).status_code == 200
    keys.clear()
    assert client.get("/v1/models", headers=header).status_code == 401
    assert client.get("/v1/models").status_code == 401


def test_the_log_names_a_key_by_its_digest(keyed: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cascade.serving"):
        assert asked(keyed, Authorization=f"Bearer {KEYS[1]}") == 200
        assert asked(keyed, Authorization="Bearer of-a-stranger") == 401
        assert eventually(lambda: len(caplog.records) == 2)  # written after the answer was sent
    keys = [record.message.rpartition(" ")[2] for record in caplog.records]
    assert keys == [f"key={hashlib.sha256(KEYS[1].encode()).hexdigest()[:12]}", "key=-"]


def test_each_key_has_a_share_of_images_by_the_minute(backends: dict[str, SmallBackend]) -> None:
    def ask(key: str, **fields: object) -> httpx2.Response:
        return HTTP.post(url, json=GENERATION | fields, headers={"Authorization": f"Bearer {key}"})

    with serving(*backends.values(), keys=KEYS, limits=Limits(key_images_minute=3)) as address:
        url = f"{address}/v1/images/generations"
        assert [ask(KEYS[0], n=n).status_code for n in (1, 2)] == [200, 200]
        refused = ask(KEYS[0])
        seconds, error = int(refused.headers["Retry-After"]), refused.json()["error"]
        assert 1 <= seconds <= 20
        assert refused.status_code == 429
        assert error["message"] == f"this key may ask for 3 images a minute: try again in {seconds} s"
        assert error["type"] == "rate_limit_error"
        assert ask(KEYS[1], n=3).status_code == 200
    assert backends["tiny"].jobs[-1].key == hashlib.sha256(KEYS[1].encode()).hexdigest()[:12]


def test_a_share_fills_up_evenly_and_more_than_a_minutes_is_lent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("components.serving.keys.time.monotonic", lambda: clock[0])
    rates = Rates(60)

    def take(images: int) -> float:
        return asyncio.run(rates.take("key", images))

    assert [take(40), take(20), take(1), take(30)] == [0, 0, 1, 30]
    clock[0] += 30
    assert [take(30), take(1)] == [0, 1]
    clock[0] += 60
    assert [take(90), take(1)] == [0, 31]
