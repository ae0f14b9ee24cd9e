"""Laws of object stores beyond those of every kind of storage: networks, large files, refusals, what is missing."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from components.data.listing import list_versions
from components.runtime.storage.artifact import FileEntry
from components.runtime.storage.connection import connect
from components.runtime.storage.store import Store, StoreError, digest_of, read_range, read_url
from tests.conftest import through_faults
from tests.emulators import KEY, lack
from tests.faults.proxy import FAULTS, OVER_TLS, counted
from tests.refusals import one_line
from tests.stored_files import answering, assert_bytes_arrive

SERVER = {  # variable with the address of each store's server
    "s3": "AWS_ENDPOINT_URL",
    "gs": "STORAGE_EMULATOR_HOST",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
}
QUICK = {"read_timeout": 0.3, "connect_timeout": 2, "retries": {"mode": "standard", "max_attempts": 2}}
EXTRAS = [("gs", "gcsfs", "gcs"), ("gcs", "gcsfs", "gcs"), ("az", "adlfs", "azure"), ("abfs", "adlfs", "azure")]


@pytest.fixture
def anew() -> Iterator[None]:
    """File systems made of the environment as it is now."""
    import adlfs
    import gcsfs.core
    import s3fs

    kinds = (adlfs.AzureBlobFileSystem, gcsfs.core.GCSFileSystem, s3fs.S3FileSystem)
    for kind in kinds:
        kind.clear_instance_cache()
    yield
    for kind in kinds:
        kind.clear_instance_cache()


@pytest.fixture(params=SERVER)
def bucket(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture
def bad_network(bucket: str, anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The log of a proxy that hurts every few requests to the bucket's server. S3 alone finds wrong bytes by itself."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": QUICK})
    variable, tls = SERVER[bucket[:2]], not bucket.startswith("s3")
    given = os.environ[variable]
    server = "http://" + given.partition("http://")[2].partition("/")[0]
    with through_faults(server, tmp_path / "faults.jsonl", seed=3, gap=(2, 3), hang=0.6, tls=tls) as endpoint:
        monkeypatch.setenv(variable, given.replace(server, endpoint))
        yield tmp_path / "faults.jsonl"


def test_whatever_a_network_does_the_bytes_arrive(bad_network: Path, bucket: str, tmp_path: Path):
    store = Store(f"{bucket}/store")
    assert_bytes_arrive(store, tmp_path, files=9)
    store.delete_folder("once")
    assert store.list("once") == []
    for kind in ("read", "write"):
        assert {fault for where, fault in counted(bad_network) if where == kind} == set(
            FAULTS if bucket.startswith("s3") else OVER_TLS
        )


def test_a_large_file_comes_back_whole_and_by_ranges(bucket: str, tmp_path: Path):
    """Amazon's and Google's in parts of 50 MiB, Azure's in blocks of 4 MiB: one file when the last has come."""
    block, store = np.random.default_rng(0).bytes(2**20), Store(bucket)
    with open(tmp_path / "large", "wb") as file:
        for number in range(101):
            file.write(number.to_bytes(8) + block)
    expected = digest_of(tmp_path / "large")
    store.upload(tmp_path / "large", "large")
    if bucket.startswith("s3"):
        filesystem, path = connect(store.url("large"))
        assert filesystem.info(path)["ETag"].endswith('-3"')
    store.check("large", expected)
    store.download("large", tmp_path, "back", expected=expected)
    place = 60 * (2**20 + 8)
    assert read_range(store.url("large"), place, place + 8) == (60).to_bytes(8)
    assert read_range(store.url("large"), expected.bytes - 4, expected.bytes + 4) == block[-4:]
    (version,) = list_versions(store.url("large"))
    assert version.bytes == expected.bytes
    assert version.mark


@pytest.mark.parametrize(("protocol", "package", "extra"), EXTRAS)
def test_a_missing_package_is_one_line_that_names_the_extra(
    protocol: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    lack(package, protocol, monkeypatch=monkeypatch)
    url = f"{protocol}://bucket/runs"
    for use in (Store(url).check_writable, lambda: read_url(url), lambda: list_versions(url)):
        with pytest.raises(StoreError) as caught:
            use()
        assert str(caught.value).endswith(f" needs the extra {extra}: pip install 'image-cascade[{extra}]'")
        assert str(caught.value).startswith(url)


def test_what_azure_lacks_is_named(anew: None, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"^az://bucket/runs: .*set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE"):
        Store("az://bucket/runs").check_writable()


def test_deletions_of_an_address_with_a_wildcard_reach_no_other_folder(bucket: str):
    """An object store would delete what the pattern finds."""
    other = Store(f"{bucket}/runs1")
    other.write("stages/base/k/train/model", b"of a colleague")
    for wild in (Store(f"{bucket}/runs[1]"), Store(f"{bucket}/run*")):
        for change in (wild.delete_folder, wild.check_writable):
            with one_line(StoreError, "holds a wildcard, which deletions would expand: rename the folder"):
                change()
    assert [info.path for info in other.list()] == ["stages/base/k/train/model"]


def test_an_address_that_names_its_account_is_told_in_the_form_that_works():
    with pytest.raises(StoreError, match=r"write az://data/runs and set AZURE_STORAGE_ACCOUNT_NAME=mine$"):
        connect("abfss://data@mine.dfs.core.windows.net/runs")


def test_a_wrong_key_is_refused_without_repeating_it(az_bucket: str, anew: None, monkeypatch: pytest.MonkeyPatch):
    wrong = KEY.swapcase()
    known = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", known.replace(KEY, wrong))
    with one_line(StoreError, match="access denied") as caught:
        Store(az_bucket).check_writable()
    assert wrong[:20] not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_read_is_told_at_once(
    status: int, google_storage: None, anew: None, monkeypatch: pytest.MonkeyPatch
):
    """As Google answers to nobody (401) and to somebody without the right (403); the emulator refuses no one."""
    words = "Anonymous caller does not have storage.objects.get access"
    body = b'{"error": {"code": %d, "message": "%s"}}' % (status, words.encode())
    with answering(lambda command, before: (status, body)) as (address, came):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(StoreError, match=f"^gs://bucket/a: access denied \\({words}") as caught:
            read_url("gs://bucket/a")
    assert "\n" not in str(caught.value)
    assert len(came) == 1


def test_a_server_that_is_away_is_asked_again_and_then_named(
    google_storage: None, anew: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("components.runtime.storage.connection.REQUESTS", 1)
    monkeypatch.setattr("components.runtime.storage.connection.ATTEMPTS", 3)
    body = b'{"error": {"code": 503, "message": "Backend Error"}}'
    with answering(lambda command, before: (503, body)) as (address, came):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(StoreError, match=r"gs://bucket/a failed 3 times: Backend Error, 503; check the network"):
            read_url("gs://bucket/a")
    assert len(came) == 3


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_a_store_travels_without_its_keys(kind: str, request: pytest.FixtureRequest):
    """What workers are sent is the address alone: their keys are those of their own environment."""
    import pickle

    url = request.getfixturevalue(f"{kind}_bucket")
    filesystem, _ = connect(url)
    sent = pickle.dumps((Store(url), FileEntry(path="a", bytes=1, sha256="b"), filesystem))
    assert KEY.encode() not in sent
    again = pickle.loads(sent)[0]
    again.write("a", b"1")
    assert again.read("a") == b"1"
