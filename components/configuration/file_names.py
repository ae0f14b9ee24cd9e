"""Names of files and folders below a folder, checked: none names a place outside.

A name has one form only, so that two names are two files on every disk and in every store: parts with `/` between
them, in Unicode's form NFC. Wildcards are refused because object stores' deletions expand them, `::` because fsspec
makes another address of what follows."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

MOST_BYTES, MOST_BYTES_OF_PART = 1024, 255
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, halves of characters, line ends
FAULTS = {
    "is absolute": re.compile(r"/"),
    "names a drive": re.compile(r"(.*/)?[A-Za-z]:", re.DOTALL),
    "has an empty part": re.compile(r".*//|.*/$|$", re.DOTALL),
    "has a part of dots": re.compile(r"(.*/)?\.\.?(/|$)", re.DOTALL),
    "holds a backslash": re.compile(r".*\\", re.DOTALL),
    "holds a wildcard": re.compile(r".*[*?\[]", re.DOTALL),
    "holds ::": re.compile(r".*::", re.DOTALL),
}


def file_name(name: str) -> str:
    """Checks the name of a file or folder below another folder. Returns the name, or raises ValueError."""
    if fault := _fault(name):
        shown = f"{name[:60]!r}{'…' if len(name) > 60 else ''}"
        raise ValueError(f"{shown} is no name of a file inside a folder: it {fault}")
    return name


def folder_name(name: str) -> str:
    """Checks a name of a single part by `file_name`, and returns the name. Raises ValueError."""
    if "/" in file_name(name):
        raise ValueError(f"{name!r} is no name of a folder: it has several parts")
    return name


FileName = Annotated[str, AfterValidator(file_name)]
FolderName = Annotated[str, AfterValidator(folder_name)]


def _fault(name: str) -> str | None:
    for fault, form in FAULTS.items():
        if form.match(name):
            return fault
    if any(unicodedata.category(character) in HIDDEN for character in name):
        return "holds a control character"
    if not unicodedata.is_normalized("NFC", name):
        return "is in another Unicode form than NFC"
    if len(name.encode()) > MOST_BYTES or any(len(part.encode()) > MOST_BYTES_OF_PART for part in name.split("/")):
        return f"has more than {MOST_BYTES} bytes, or {MOST_BYTES_OF_PART} in a part"
    return None
