"""Tars of the user written again as smaller ones, so that readers need not fetch a gigabyte for a few images of it.

One task a tar, which is read once. Samples stay as they are, byte for byte; those of a tar are shuffled (by a hash of
their keys, so that equal tars give equal bytes) before they are cut into shards: three shards, the window that training
shuffles, are then samples of three tars, as they were before. A tar's sidecar is written after its shards: what was
killed reads no tar again whose shards are all there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pydantic import ValidationError

from components.data.errors import ShardError
from components.data.shards import Quarantined, ShardEntry
from components.data.sources.webdataset import TarFacts, checked_groups, shard_entry, surveyed, tar_facts
from components.data.tars import Group, iterate_shard, write_shard
from components.storage.store import Store, read_url


@dataclass(frozen=True)
class TarResharder:
    """The URL of a tar in (with the mark of its version), its facts (JSON) out; its shards are in `out` then."""

    out: Store
    holdout_fraction: float
    samples_per_shard: int
    present: dict[str, int] = field(default_factory=dict)  # bytes of what `out` holds already, by path

    def __call__(self, number: int, content: str) -> str:
        recipe = f"shards of {self.samples_per_shard}, {self.holdout_fraction}\n{content}"
        digest = hashlib.sha256(recipe.encode()).hexdigest()[:32]
        facts = self._finished(digest) or self._write(digest, content.partition("\n")[0])
        return facts.model_dump_json()

    def _finished(self, digest: str) -> TarFacts | None:
        if sidecar(digest) not in self.present:
            return None
        try:
            facts = TarFacts.model_validate_json(self.out.read(sidecar(digest)))
        except ValidationError:  # left by another version
            return None
        return facts if all(self.present.get(entry.url) == entry.bytes for entry in facts.entries) else None

    def _write(self, digest: str, url: str) -> TarFacts:
        checked = list(checked_groups(read_url(url), url))
        groups = shuffled([group for group, reason in checked if reason is None])
        refused = [Quarantined(key=group.key, shard=url, reason=said) for group, said in checked if said is not None]
        entries: list[ShardEntry] = []
        for number, part in enumerate(cut(groups, self.samples_per_shard)):
            quarantined = [] if entries else refused
            entries.append(self._write_shard(f"shard-{digest[:12]}-{number:05d}.tar", part, quarantined))
        facts = tar_facts([surveyed(group) for group in groups], entries, self.holdout_fraction)
        self.out.write(sidecar(digest), facts.model_dump_json().encode())
        return facts

    def _write_shard(self, name: str, groups: Sequence[Group], quarantined: Sequence[Quarantined]) -> ShardEntry:
        data = write_shard({"__key__": group.key, **group.members} for group in groups)
        if list(iterate_shard(data, name)) != list(groups):
            raise ShardError(f"shard {name} does not read as it was written: its keys or members have unusual names")
        self.out.write(name, data)
        return shard_entry(name, data, [surveyed(group) for group in groups], quarantined, self.holdout_fraction)


def shuffled(groups: Sequence[Group]) -> list[Group]:
    """In the order of a hash of their keys: not that of the split, or held-out samples would stand together."""
    return sorted(groups, key=order_of)


def order_of(group: Group) -> bytes:
    return hashlib.sha256(f"order {group.key}".encode()).digest()


def cut(groups: Sequence[Group], most: int) -> list[Sequence[Group]]:
    """Parts of about one size, in order, of at most `most` each; one empty part of nothing."""
    count = max(1, -(-len(groups) // most))
    bounds = [len(groups) * number // count for number in range(count + 1)]
    return [groups[first:last] for first, last in pairwise(bounds)]


def sidecar(digest: str) -> str:
    """Path of what is known of a tar whose shards are written."""
    return f"parts/{digest}.json"
