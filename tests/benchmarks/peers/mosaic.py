"""MosaicML Streaming as a reader, in a virtual environment of its own: `python mosaic.py IMAGES FOLDER HOW`.

Converts the JPEGs of a folder's tars once, and prints JSON: seconds and CPU seconds of a stretch of batches, and
seconds to the first batch of a new loader and of one that goes on in the middle.
"""

import io
import json
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # pyrefly: ignore[missing-import]


class Photos(StreamingDataset):
    def __getitem__(self, at: Any) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(super().__getitem__(at)["image"])).convert("RGB"))


def write(images: Path, folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for path in sorted(images.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg") and (file := tar.extractfile(member)) is not None:
                        writer.write({"image": file.read(), "label": 1})


def loader_of(folder: Path, *, batch: int, readers: int) -> StreamingDataLoader:
    dataset = Photos(local=str(folder), batch_size=batch, shuffle=True, num_canonical_nodes=1)
    return StreamingDataLoader(dataset, batch_size=batch, num_workers=readers, persistent_workers=True, drop_last=True)


def epochs(loader: StreamingDataLoader) -> Any:
    while True:
        yield from loader


def cpu() -> float:
    own = psutil.Process()
    return sum(sum(each.cpu_times()[:4]) for each in (own, *own.children(recursive=True)))


def main(images: str, place: str, how: str) -> None:
    folder, numbers = Path(place), json.loads(how)
    warm_up, steps, batch = numbers["warm_up"], numbers["steps"], numbers["batch"]
    if not folder.exists():
        write(Path(images), folder)
    start = time.perf_counter()
    loader = loader_of(folder, batch=batch, readers=numbers["readers"])
    batches = epochs(loader)
    next(batches)
    found = {"first": time.perf_counter() - start}
    for _ in islice(batches, warm_up):
        pass
    start, used = time.perf_counter(), cpu()
    assert sum(len(images) for images in islice(batches, steps)) == steps * batch
    found |= {"seconds": time.perf_counter() - start, "cpu": cpu() - used}
    state = loader.state_dict()
    del batches, loader
    start = time.perf_counter()
    resumed = loader_of(folder, batch=batch, readers=numbers["readers"])
    resumed.load_state_dict(state)
    next(iter(resumed))
    print(json.dumps(found | {"resumed": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
