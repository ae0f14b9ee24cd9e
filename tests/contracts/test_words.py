"""The field's words: what the project once said otherwise stands nowhere."""

import re
from pathlib import Path

GONE = {  # what stood, as a pattern -> what stands in its place
    r"\bpictures?\b": "image",
    r"_pictures?\b|\bpictures?_": "image",
    r"\broads?\b|_roads?\b": "branch, or generator where a request chooses one",
    r"\bholes?\b": "mask",
    r"\boffers\b": "dataset_info",
    r"\blet_others_go_first\b": "set_idle_priority",
    r"\byields\s*[=:]\s*(bool|True|False)": "low_priority",
    r"(?<!\.)\bbeside\s*=": "concurrent_trainings",
    r"\bwork_off\b": "finish",
    r"\bwhat_it_came_to\b": "collect_result",
    r"\bbring_text_encoder\b": "import_text_encoder",
    r"\bpainter\b": "CascadeModel",
    r"\bray-notes\b": "the reason itself",
    r"\b(bits|values) a (dim|dimension|token)\b": "bits/dim, bits/token",
    r"\b(steps|images|units|samples) a second\b": "steps/s",
}
ELSEWHERE = ("tests/contracts/test_words.py",)  # this list
TEXT = (".py", ".md", ".yaml", ".toml", ".j2", ".sh", "Makefile", ".ci/run")


def test_no_word_that_the_field_does_not_use(repository: Path, tracked_files: list[Path]) -> None:
    patterns = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in GONE.items()}
    found = []
    for path in tracked_files:
        name = path.relative_to(repository).as_posix()
        if name in ELSEWHERE or not name.endswith(TEXT):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            found += [
                f"{name}:{number}: say {instead}: {line.strip()[:80]}"
                for pattern, instead in patterns.items()
                if pattern.search(line)
            ]
    assert found == []


def test_the_readme_is_read_in_minutes(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
