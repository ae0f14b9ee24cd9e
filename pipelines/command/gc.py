"""`cascade gc`: show or delete folders that no manifest lists."""

import typer

from components.runtime.storage.garbage import collect, find_garbage
from components.runtime.storage.store import Store
from pipelines.planning.profiles import storage_uri


def collect_garbage(storage: str | None, *, unused: bool, delete: bool) -> None:
    """Print each unneeded folder with size and reason; with `delete`, delete the folders."""
    root = Store(storage_uri(storage))
    garbage = find_garbage(root, unused=unused, on_wait=lambda line: typer.echo(line, err=True))
    for folder in garbage:
        typer.echo(f"{folder.bytes / 1e6:10.1f} MB  {folder.path}  ({folder.reason})")
    gone = collect(root, garbage, unused=unused) if delete else garbage
    total = sum(folder.bytes for folder in gone) / 1e6
    typer.echo(f"{len(gone)} folders, {total:.1f} MB {'deleted' if delete else '(delete them with --yes)'}")
    for folder in garbage:
        if folder not in gone:
            typer.echo(f"left alone, it is needed again: {folder.path}")
