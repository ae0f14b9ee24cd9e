"""What refuses says so in one line: an error raised here, or a command that ends with exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.in_process import Done


@contextmanager
def one_line(kind: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo]:
    """Holds what is raised inside to its kind, its words, and one line."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def assert_refused(done: Done, *words: str) -> None:
    """The command ended with exit code 2 and a single line of error that holds these words."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []
