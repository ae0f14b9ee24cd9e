"""Real parts that the whole suite shares: a Ray cluster, an MLflow server, a server process for each object store."""

import gc
import logging
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from pipelines.command.options import share_cores
from tests.waiting import eventually
from tests.warm_workers import warm_workers

share_cores()  # before torch is imported, here and in all that the tests start
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else one for each logical CPU, asked for or not
os.environ.setdefault("RAY_LOG_MONITOR_MAX_OPEN_FILES", "0")  # else it reads all logs for nobody
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")  # else it looks for them ten times a second
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "1e9")
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers stand still while two other files compute
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else processes that import torch first
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else threads of numpy spin for cores that other files compute on
SERVER_SECONDS = 180
REPOSITORY = Path(__file__).parents[1]
ROOMS = sorted(init.parent.name for init in REPOSITORY.glob("[cp]*s/**/*/__init__.py"))
SHARE_RAY = (  # beside tests/distributed
    *("test_data_command", "test_data_ingest", "test_data_stream", "test_evaluation_generated", "test_execute"),
    *("test_measures", "test_recorder_dies", "test_rows", "test_run_patience", "test_serving", "test_survives"),
)
SHARE_MLFLOW = ("test_submitted_job", "test_registry_laws", "test_lost_journal", "test_mlflow_tracking")
SHARE_STORES = (
    *("test_storage", "test_storage_clouds", "test_storage_outages", "test_file_names", "test_garbage"),
    *("test_verify_command", "test_training_parts", "test_kept_parts", "test_preflight"),
    *("test_data_shards", "test_data_sources", "test_data_parquet"),
)
LONG = ("test_installed", "test_cluster_checks", "test_serve_deploy", "test_serve_command", "test_packed_models")
RAY, MLFLOW, STORES = "the suite's Ray", "an MLflow server", "servers of stores"
FIRST = (RAY, MLFLOW, *LONG, STORES)
HEAVY = ("test_cost", "test_step_model", "test_export_programs")
FORKED = (  # imported once, by the process that is forked for ranks of gloo and for racing writers
    *("torch._dynamo", "torch.distributed.fsdp", "tests.distributed.gloo", "tests.tiny_training"),
    *("tests.tiny_text_image", "s3fs", "gcsfs", "adlfs", "tests.stored_files"),
)
UNLOGGED: list[str] = []  # records that a handler could not write, which nothing but a traceback in the output says


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--room", help="test what imports this room alone: diffusion, data, engine, …")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files of tests that import nothing of `--room`."""
    room = config.getoption("--room")
    if room is None or not collection_path.is_file() or collection_path.name == "conftest.py":
        return None
    imports = rf"^(?:from|import) (?:components|pipelines)\.(?:\w+\.)*{room}\b"
    return None if re.search(imports, collection_path.read_text(), re.MULTILINE) else True


def pytest_configure(config: pytest.Config) -> None:
    """A record that can't be logged fails a test. Where several processes test at once, each computes on one core.

    Raises UsageError for a room that is none.
    """
    if config.getoption("--room") not in (None, *ROOMS):
        raise pytest.UsageError(f"no room {config.getoption('--room')!r}; the rooms are {', '.join(ROOMS)}")
    logging.Handler.handleError = note_unlogged
    multiprocessing.set_forkserver_preload(list(FORKED))
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def note_unlogged(handler: logging.Handler, record: logging.LogRecord) -> None:
    UNLOGGED.append(f"{record.pathname}:{record.lineno}: {handler} can't write {record.msg!r}: {sys.exc_info()[1]!r}")


@pytest.fixture(autouse=True, scope="module")
def no_settings_of_before() -> Iterator[None]:
    """MLflow writes the last address that it was told into the environment, and a run how long it waits for storage,
    where commands of the next file read it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "CASCADE_OUTAGE_SECONDS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def no_garbage_of_before() -> None:
    """What was imported and kept until now stays: no collection in this file has to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in this process logs to the stderr of its test, which is closed with it."""
    root, product = logging.root, logging.getLogger("cascade")
    handlers, levels = root.handlers[:], (root.level, product.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    product.setLevel(levels[1])
    unlogged = UNLOGGED[:]
    UNLOGGED.clear()
    assert not unlogged


def pytest_sessionfinish() -> None:
    assert not UNLOGGED  # of what outlives the tests


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Each of several processes tests a file at a time, but one of them all that shares the suite's Ray."""
    return ByCluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first: what is short fills what is left of all processes."""
    items.sort(key=lambda item: rank_of(item.path))


def rank_of(file: Path) -> int:
    """Place among all files: those of FIRST, what starts processes, then all else."""
    if (scope := scope_of(file)) in FIRST:
        return FIRST.index(scope)
    return len(FIRST) + (file.parent.name not in ("integration", "browser") and file.stem not in HEAVY)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """No garbage is collected while files are imported: a seventh of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


class ByCluster(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return scope_of(Path(nodeid.partition("::")[0]))


def scope_of(file: Path) -> str:
    """What one process tests at a stretch."""
    if file.parent.name == "distributed" or file.stem in SHARE_RAY:
        return RAY
    if file.stem in SHARE_MLFLOW:
        return MLFLOW
    if file.stem in SHARE_STORES:
        return STORES
    return file.stem if file.stem in LONG else str(file)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """In CI a skipped test is a failure: what CI does not check is not checked at all."""
    report = yield
    return fail_if_skipped_in_ci(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    return fail_if_skipped_in_ci(report)


def fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Wait until a server answers. Raises if its process ends or the time is up."""

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"the server of {url} ended with {process.returncode}")
        with suppress(OSError):
            return bool(urllib.request.urlopen(url, timeout=2))
        return False

    if not eventually(answers, SERVER_SECONDS, pause=0.2):
        raise TimeoutError(f"{url} did not answer in {SERVER_SECONDS} s")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole suite, with the logical CPUs that the product gives itself."""
    import ray

    from pipelines.engine.session import start_ray

    with warm_workers():
        start_ray(worker_start_timeout=120, verbose=False)
    yield
    ray.shutdown()


@contextmanager
def mlflow_process(folder: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process, in a group of its own, of an MLflow server with artifact proxy on what a folder holds."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that nobody asks here
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server that all tests share."""
    with mlflow_process(tmp_path_factory.mktemp("mlflow")) as (address, _):
        yield address


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite with nothing in them: a copy costs nothing, making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of a real S3 server process; its address and keys stand in the environment for all that follows."""
    from tests.emulators import s3_server

    with s3_server() as settings:
        yield settings["AWS_ENDPOINT_URL"]


@contextmanager
def through_faults(
    server: str, log: Path, *, seed: int, gap: tuple[int, int], hang: float, tls: bool = False
) -> Iterator[str]:
    """Endpoint of a proxy process before a store's server that hurts every few requests; see `tests.faults.proxy`."""
    port = free_port()
    command = [sys.executable, "-m", "tests.faults.proxy", server, str(port), "--log", str(log), "--seed", str(seed)]
    command += ["--gap", *map(str, gap), "--hang", str(hang)]
    process = subprocess.Popen([*command, "--tls"] if tls else command)
    try:
        wait_for(f"http://127.0.0.1:{port}/alive", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """URL of a new bucket."""
    import s3fs

    name = f"bucket-{time.time_ns()}"
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def google_storage() -> Iterator[None]:
    """An emulator of Google's object store; its address stands in the environment for all that follows."""
    from tests.emulators import google_server, in_environment

    with google_server() as settings, in_environment(settings):
        yield


@pytest.fixture(scope="session")
def azure_storage() -> Iterator[None]:
    """Azurite; its address and key stand in the environment for all that follows."""
    from tests.emulators import azure_server, in_environment

    with azure_server() as settings, in_environment(settings):
        yield


@pytest.fixture
def gs_bucket(google_storage: None) -> str:
    """URL of a new bucket."""
    from tests.emulators import new_bucket

    return new_bucket("gs")


@pytest.fixture
def az_bucket(azure_storage: None) -> str:
    """URL of a new container."""
    from tests.emulators import new_bucket

    return new_bucket("az")


@pytest.fixture(params=["local", "memory", "s3", "gs", "az"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same law on every kind of storage."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://store-{time.time_ns()}"
    return f"{request.getfixturevalue(f'{request.param}_bucket')}/store"
