"""Files that go to a store and come back, whatever lies between."""

from pathlib import Path

import numpy as np

from components.storage.store import Store, in_parallel


def assert_bytes_arrive(store: Store, place: Path, *, files: int) -> None:
    """So many files are sent, written, written once, read, listed and fetched, several at a time, by way of `place`."""
    made = {f"{number:03d}.bin": np.random.default_rng(number).bytes(2000 + number) for number in range(files)}
    for name, data in made.items():
        (place / name).write_bytes(data)
    in_parallel(lambda name: store.upload(place / name, f"sent/{name}"), made)
    in_parallel(lambda name: store.write(f"written/{name}", made[name]), made)
    assert all(in_parallel(lambda name: store.write_once(f"once/{name}", made[name]), made))
    assert not store.write_once("once/000.bin", b"another")
    for folder in ("sent", "written", "once"):
        assert in_parallel(lambda name, folder=folder: store.read(f"{folder}/{name}"), made) == [*made.values()]
        assert [info.bytes for info in store.list(folder)] == [len(data) for data in made.values()]
    in_parallel(lambda name: store.download(f"sent/{name}", place / "back", name), made)
    assert all((place / "back" / name).read_bytes() == data for name, data in made.items())
