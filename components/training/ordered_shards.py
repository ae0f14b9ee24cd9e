"""What Ray Train's actor of data sets needs. No torch: there is such an actor on the head for each training."""

from collections.abc import Callable
from typing import Any

import ray.data
import ray.train

from components.data.crews import split_stream

MakeDataset = Callable[..., "ray.data.Dataset | None"]  # called with world_size=


def nothing(*, world_size: int) -> None:
    """The stream of a training that has taken all its steps."""


class OrderedShards(ray.train.DataConfig):
    """Block i goes to crew i modulo the number of crews (`data/crews.py`): the order that makes a global batch."""

    def configure(
        self, datasets: dict[str, MakeDataset], world_size: int, *unused: Any, **also_unused: Any
    ) -> list[dict[str, "ray.data.DataIterator"]]:
        """The iterators of each rank, with order preserved; none where `resumed` gave no stream."""
        shards: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, make in datasets.items():
            dataset = make(world_size=world_size)
            if dataset is None:
                continue
            dataset.context.execution_options.preserve_order = True
            for shard, split in zip(shards, split_stream(dataset, world_size=world_size), strict=True):
                shard[name] = split
        return shards
