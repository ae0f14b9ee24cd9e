"""The list of a packed model's files and digests, to check files against the registered model.
The list lies in the model's folder in the format of `sha256sum`, so `sha256sum -c SHA256SUMS` works. Imports only what
the packed model of the registry carries."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIST = "SHA256SUMS"
CACHE, META = "__pycache__", "registered_model_meta"  # made by Python and MLflow
SHOWN = 3  # files that an error names


def write_list(folder: Path, digests: Mapping[str, str] | None = None) -> str:
    """Write the list of all files in `folder` and return the text.
    `digests` are known already, by path; the rest is computed."""
    known = dict(digests or {})
    files = _files(folder)
    sums = known | _digests(folder, [path for path in files if path not in known])
    text = "".join(f"{sums[path]}  {path}\n" for path in files)
    (folder / LIST).write_text(text)
    return text


def digest_of_list(text: str) -> str:
    """The sha256 of a list."""
    return hashlib.sha256(text.encode()).hexdigest()


def differences(folder: Path, *, digest: str | None = None, text: str | None = None) -> list[str]:
    """A line for each file in `folder` that is missing, changed or added by a list of all files.
    `digest` and `text` of the list are given where they stand elsewhere too; else the list in the folder is
    believed."""
    place = folder / LIST
    lying = place.read_bytes().decode(errors="replace") if place.is_file() else None
    if text is None:
        text = lying
    if text is None:
        return [f"{LIST} is missing"]
    if digest not in (None, digest_of_list(text)):
        return [f"{LIST} is changed"]
    listed = {path: digest for digest, _, path in (line.partition("  ") for line in text.splitlines())}
    there = _files(folder)
    sums = _digests(folder, [path for path in there if path in listed])
    lines = [] if lying == text else [f"{LIST} is {'missing' if lying is None else 'changed'}"]
    lines += [f"{path} is missing" for path in listed if path not in sums]
    lines += [f"{path} is changed" for path in sums if sums[path] != listed[path]]
    return lines + [f"{path} was added" for path in there if path not in listed]


def check_files(folder: Path, model: str, *, digest: str | None = None, text: str | None = None) -> None:
    """Raise ValueError, in a single line, if `differences` has any; `model` names the model there."""
    if lines := differences(folder, digest=digest, text=text):
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ValueError(
            f"{model} is not as it was registered: {', '.join(lines[:SHOWN])}{more}; restore what differs, or delete "
            "this version and run again, which registers it anew"
        )


def _files(folder: Path) -> list[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    own = (path for path in files if CACHE not in path.parts)
    return sorted(path.as_posix() for path in own if path.as_posix() not in (LIST, META))


def _digests(folder: Path, paths: list[str]) -> dict[str, str]:
    """Path -> sha256, several files at a time: hashing leaves Python's lock alone."""

    def digest(path: str) -> str:
        with open(folder / path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(paths, threads.map(digest, paths), strict=True))
