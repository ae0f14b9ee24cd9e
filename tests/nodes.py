"""Machines that share nothing: a Ray cluster whose nodes have the network and a read-only checkout in common, and no
other file. What one of them needs of another goes over the network, as to object storage, or is missing.

Each node lives in a mount namespace with a /tmp, a /dev/shm, a home and a ./runs of its own, in a folder that is
deleted when the node is lost. Namespaces need root or a kernel that grants them to users; without either, starting a
node raises what `unshare` said.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import free_port
from tests.waiting import eventually
from tests.warm_workers import warm_environment

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NODE_CPUS = 8  # logical
START_SECONDS = 180
USER = [] if os.geteuid() == 0 else ["--user"]
UNSHARE = ["unshare", "--mount", *(["--map-root-user"] if USER else [])]
# A user may only add to the flags that a mount has.
FLAGS = [
    name
    for name in ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime")
    if os.statvfs(ROOT).f_flag & getattr(os, f"ST_{name.upper()}")
]
# A checkout below /tmp stays where it is: it is mounted into the node's /tmp before that hides the machine's.
MOUNTS = """
set -eu
root=$1 disk=$2 flags=$3; shift 3
case "$root/" in /tmp/*) mkdir -p "$disk$root"; mount --bind "$root" "$disk$root";; esac
mount --rbind "$disk/tmp" /tmp
mount -t tmpfs none /dev/shm
mount --bind "$root" "$root"
mount --bind "$disk/runs" "$root/runs"
mount -o "remount,bind,$flags" "$root"
cd "$root"
exec "$@"
"""


class Node:
    """One machine: the processes of a namespace, and its disk."""

    def __init__(self, name: str, folder: Path, *, address: str, options: list[str], environment: dict[str, str]):
        self.name, self.disk, self.log = name, folder / name, folder / f"{name}.log"
        self.namespace = ""
        for part in ("tmp/home", "runs"):
            (self.disk / part).mkdir(parents=True)
        ray = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address", address]
        ray += ["--dashboard-agent-listen-port", "0", *options]
        mounts = ["bash", "-c", MOUNTS, name, str(ROOT), str(self.disk), ",".join(["ro", *FLAGS])]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*UNSHARE, *mounts, *ray], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until Ray has started. Raises RuntimeError with what was said if it does not."""
        started = lambda: "block forever" in self.log.read_text()  # noqa: E731
        eventually(lambda: started() or self.process.poll() is not None, START_SECONDS, pause=0.2)
        if not started():
            self.kill()
            raise RuntimeError(f"node {self.name} did not start: {self.log.read_text()[-2000:]}")
        self.namespace = namespace(self.process.pid)
        assert self.namespace != namespace(os.getpid())

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The node's processes whose title starts so."""
        found = [psutil.Process(pid) for pid in psutil.pids() if self.namespace and namespace(pid) == self.namespace]
        return [process for process in found if title_of(process).startswith(title)]

    def files(self) -> list[str]:
        """The files on the node's disk, relative to it; no sockets."""
        return sorted(str(path.relative_to(self.disk)) for path in self.disk.rglob("*") if path.is_file())

    def kill(self) -> None:
        """`kill -9` of all of its processes at once; its disk is gone with it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        while living := self.processes():
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(living, timeout=5)
        self.process.wait()
        shutil.rmtree(self.disk, ignore_errors=True)


class Cluster:
    """A head without logical CPUs, and workers. A job is submitted to it, or a driver runs on its head."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.started = folder, 0
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        places = {"HOME": "/tmp/home", "TMPDIR": "/tmp", "RAY_TMPDIR": "/tmp", "PATH": f"{BIN}:{os.environ['PATH']}"}
        places["RAY_raylet_start_wait_time_s"] = str(START_SECONDS)  # Ray's own 30 are too few beside other suites
        self.environment = os.environ | warm_environment("libraries") | token | places | environment
        self.environment.pop("RAY_ADDRESS", None)
        self.workers: list[Node] = []
        self.start_head()

    def start_head(self) -> None:
        """A new head, which knows nothing of an earlier one; workers join it by `add`."""
        gcs, dashboard, client = free_port(), free_port(), free_port()
        options = ["--head", "--num-cpus", "0", "--port", str(gcs), "--ray-client-server-port", str(client)]
        options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        self.head = self._start("head", options)
        self.head.wait()
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        self.address = f"127.0.0.{self.started + 1}:{gcs}"
        self._wait_for_dashboard()

    def add(self, count: int = 1) -> list[Node]:
        """So many more workers, with empty disks."""
        options = ["--address", self.address, "--num-cpus", str(NODE_CPUS)]
        added = [self._start("worker", options) for _ in range(count)]
        self.workers += added
        for node in added:
            node.wait()
        return added

    def kill(self, node: Node) -> None:
        """Lose a worker with its disk."""
        self.workers.remove(node)
        node.kill()

    def end(self) -> None:
        """Lose everything: no cluster outlives its head."""
        for node in (self.head, *self.workers):
            node.kill()
        self.workers.clear()

    def run(self, *command: str, log: Path) -> subprocess.Popen:
        """A driver on the head, in its namespace."""
        enter = ["nsenter", "--target", str(self.head.process.pid), "--mount"]
        enter += ["--user", "--preserve-credentials"] if USER else []
        inside = ["bash", "-c", 'cd "$1"; shift; exec "$@"', "driver", str(ROOT)]
        return self._client([*enter, *inside, *command], log, RAY_ADDRESS=self.address)

    def submit(self, *command: str, log: Path, options: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """`ray job submit OPTIONS -- COMMAND`, from a machine that is no node."""
        return self._client([str(BIN / "ray"), "job", "submit", *options, "--", *command], log, **environment)

    def _start(self, kind: str, options: list[str]) -> Node:
        self.started += 1
        address, name = f"127.0.0.{self.started + 1}", f"{kind}{self.started}"
        return Node(name, self.folder, address=address, options=options, environment=self.environment)

    def _client(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        with open(log, "ab") as file:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment | environment, stdout=file, stderr=file)

    def _wait_for_dashboard(self) -> None:
        url, token = self.environment["RAY_API_SERVER_ADDRESS"], self.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(request, timeout=5).status == 200
            return False

        if not eventually(answers, START_SECONDS, pause=0.5):
            raise TimeoutError(f"the dashboard at {url} did not answer in {START_SECONDS} s")


@contextmanager
def nodes(workers: int, **environment: str) -> Iterator[Cluster]:
    """A cluster of a head and so many workers, with these variables; its folder, below ./runs, is deleted with it."""
    runs = ROOT / "runs"
    runs.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir=runs))  # hidden from the nodes by the ./runs of each
    cluster = None
    try:
        cluster = Cluster(folder, **environment)
        cluster.add(workers)
        yield cluster
    finally:
        if cluster is not None:
            cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def namespace(pid: int) -> str:
    """The mount namespace of a process; empty if it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
