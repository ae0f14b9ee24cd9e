"""Version and commit of this code, recorded with all results, and never part of a key.

Needs the standard library alone: the wheel's build asks too.
"""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the packages
PACKAGES = ("components", "pipelines")
PROJECT = "image-cascade"
COMMIT = "COMMIT"  # file of ROOT where there is no .git: an image's, a wheel's
VARIABLE = "CASCADE_COMMIT"  # the same of a job whose files were uploaded


def commit(root: Path = ROOT, *, of: Sequence[str] = PACKAGES) -> str:
    """The commit of the code below `root`, 40 digits, with `+changes` if the pathspecs `of` differ.
    Without a repository of its own: CASCADE_COMMIT, the file COMMIT, or a digest, as `source:1a2b3c4d5e6f`."""
    path = root / COMMIT
    written = path.read_text().strip() if path.is_file() else ""
    if said := _asked_of_git(root, of) or os.environ.get(VARIABLE, "").strip() or written:
        return said
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"source:{digest.hexdigest()[:12]}"


def short(commit: str) -> str:
    """The first 12 digits of a commit, with any suffix."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", commit)


def code_line(commit: str) -> str:
    """Package, version and commit, for a run's last lines and the report."""
    return f"{PROJECT} {version()}, {short(commit)}"


def version() -> str:
    """The version of this package; `unknown` for files outside an installation or a checkout.
    A checkout has a pyproject.toml beside the package."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    try:
        return importlib.metadata.version(PROJECT)
    except importlib.metadata.PackageNotFoundError:  # files alone, on the path
        return "unknown"


def _asked_of_git(root: Path, of: Sequence[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as in a hook

    def git(*arguments: str) -> list[str]:
        told = {"cwd": root, "env": environment, "check": True, "capture_output": True, "text": True}
        return subprocess.run(["git", *arguments], **told).stdout.splitlines()

    try:
        folder, head = git("rev-parse", "--show-toplevel", "HEAD")
        if Path(folder).resolve() != root:
            return ""
        return head + ("+changes" if git("status", "--porcelain", "--", *of) else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or one of another user
        return ""
