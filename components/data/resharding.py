"""Resharding: writes a user's tars as smaller tars, so that a few images cost no gigabyte.

Each task reads a tar once. Samples stay byte for byte; the samples of a tar are shuffled (by a hash of their keys, so
that equal tars give equal bytes) before they are cut into shards: three shards, the window that training shuffles, are
then samples of three tars, as before. A tar's record is written after its shards: after a kill no tar is read again
whose shards are all there, and whole.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from components.data.errors import ShardError
from components.data.parts import even_parts
from components.data.shards import Quarantined, ShardEntry, order_of
from components.data.sources.webdataset import checked_groups, shard_entry, surveyed, tar_facts
from components.data.tars import Group, iterate_shard, write_shard
from components.runtime.storage.artifact import FileEntry
from components.runtime.storage.kept_parts import write_record
from components.runtime.storage.store import Store, read_url


@dataclass(frozen=True)
class TarResharder:
    """Reshards a tar into `out`: URL and mark of the version in, the tar's facts (JSON) out."""

    out: Store
    holdout_fraction: float
    samples_per_shard: int

    def part_name(self, content: str) -> str:
        """Name of the tar's part: a digest of all that decides the shards."""
        recipe = f"shards of {self.samples_per_shard}, {self.holdout_fraction}\n{content}"
        return hashlib.sha256(recipe.encode()).hexdigest()[:32]

    def __call__(self, number: int, content: str) -> str:
        url, part = content.partition("\n")[0], self.part_name(content)
        checked = list(checked_groups(read_url(url), url))
        groups = sorted((group for group, reason in checked if reason is None), key=lambda group: order_of(group.key))
        refused = [Quarantined(key=group.key, shard=url, reason=said) for group, said in checked if said is not None]
        entries: list[ShardEntry] = []
        for place, shard in enumerate(even_parts(groups, self.samples_per_shard)):
            quarantined = [] if entries else refused
            entries.append(self._write_shard(f"shard-{part[:12]}-{place:05d}.tar", shard, quarantined))
        facts = tar_facts([surveyed(group) for group in groups], entries, self.holdout_fraction)
        files = [FileEntry(path=entry.url, bytes=entry.bytes, sha256=entry.sha256) for entry in entries]
        write_record(self.out, part, *files, **facts.model_dump())
        return facts.model_dump_json()

    def _write_shard(self, name: str, groups: Sequence[Group], quarantined: Sequence[Quarantined]) -> ShardEntry:
        data = write_shard({"__key__": group.key, **group.members} for group in groups)
        if list(iterate_shard(data, name)) != list(groups):
            raise ShardError(f"shard {name} does not read as it was written: its keys or members have unusual names")
        self.out.write(name, data)
        return shard_entry(name, data, [surveyed(group) for group in groups], quarantined, self.holdout_fraction)
