"""Tars of the user written again as smaller ones, so that readers need not fetch a gigabyte for a few images of it.

One task a tar, which is read once. Samples stay as they are, byte for byte; those of a tar are shuffled (by a hash of
their keys, so that equal tars give equal bytes) before they are cut into shards: three shards, the window that training
shuffles, are then samples of three tars, as they were before. A tar's sidecar is written after its shards: what was
killed reads no tar again whose shards are all there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from components.data.errors import ShardError
from components.data.parts import even_parts, sidecar
from components.data.shards import Quarantined, ShardEntry, order_of
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
        groups = sorted((group for group, reason in checked if reason is None), key=lambda group: order_of(group.key))
        refused = [Quarantined(key=group.key, shard=url, reason=said) for group, said in checked if said is not None]
        entries: list[ShardEntry] = []
        for number, part in enumerate(even_parts(groups, self.samples_per_shard)):
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
