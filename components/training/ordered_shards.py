"""Data config for Ray Train's actor of data sets; no torch, for the head holds an actor a training."""

from collections.abc import Callable
from typing import Any

import ray.data
import ray.train

from components.data.crews import split_stream

MakeDataset = Callable[..., "ray.data.Dataset | None"]  # called with world_size=


def nothing(*, world_size: int) -> None:
    """No stream, for a training with all steps taken."""


class OrderedShards(ray.train.DataConfig):
    """Hands block i to crew i mod the number of crews (`data/crews.py`), the order of a global batch."""

    def configure(
        self, datasets: dict[str, MakeDataset], world_size: int, *unused: Any, **also_unused: Any
    ) -> list[dict[str, "ray.data.DataIterator"]]:
        """The iterators of each rank, with order preserved; none where `resumed` returned no stream."""
        shards: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, make in datasets.items():
            dataset = make(world_size=world_size)
            if dataset is None:
                continue
            dataset.context.execution_options.preserve_order = True
            for shard, split in zip(shards, split_stream(dataset, world_size=world_size), strict=True):
                shard[name] = split
        return shards
