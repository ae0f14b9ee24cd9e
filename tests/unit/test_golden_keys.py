"""Keys move on purpose or not at all: who has trained the demo finds it cached after the next update."""

import json
import subprocess
import sys
from collections import defaultdict

from tests.golden_keys import GOLDEN, current_keys


def golden_keys() -> dict[str, list[list[str]]]:
    """`recipe/stage` -> its lines of the file, oldest first, each a key and why it is that one."""
    lines: dict[str, list[list[str]]] = defaultdict(list)
    for line in GOLDEN.read_text().splitlines():
        if line and not line.startswith("#"):
            name, *rest = line.split(maxsplit=2)
            lines[name].append(rest)
    return lines


def keys_with_a_field_more(default: int) -> dict[str, str]:
    command = [sys.executable, "-m", "tests.golden_keys", str(default)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_no_key_of_the_demo_or_of_smoke_moves_by_accident_and_every_one_that_moved_says_why() -> None:
    lines, now = golden_keys(), current_keys()
    moved = [f"{name} {key} WHY" for name, key in now.items() if name not in lines or lines[name][-1][0] != key]
    gone = sorted(lines.keys() - now.keys())
    assert not moved, f"moved; if that is meant, add to {GOLDEN.name}, below the lines before:\n" + "\n".join(moved)
    assert not gone, f"no longer stages: {gone}"
    unsaid = [name for name, lines in golden_keys().items() if any(rest[1:] in ([], ["WHY"]) for rest in lines)]
    assert unsaid == []


def test_a_field_moves_no_key_where_it_means_what_was_done_before_and_else_every_key_that_it_decides() -> None:
    """It is in every configuration at once, those of parts included."""
    now, after = current_keys(), keys_with_a_field_more(2)
    assert keys_with_a_field_more(1) == now
    assert now.keys() == after.keys()
    assert [name for name in now if now[name] == after[name]] == []
