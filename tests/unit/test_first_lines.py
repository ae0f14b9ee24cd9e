"""Laws of the first lines of a run: what it saw of the images, and how its workers stand to other programs."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.engine import driver
from pipelines.planning.profiles import this_machine


@pytest.mark.parametrize(
    ("given", "said"), [(None, "workers run at nice 15"), ("5", "workers run at nice 5"), ("0", "")]
)
def test_a_run_on_this_machine_says_that_its_workers_step_back(
    given: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(driver.NICENESS, raising=False)
    if given is not None:
        monkeypatch.setenv(driver.NICENESS, given)
    written, ran = Console(file=io.StringIO(), width=200), []
    monkeypatch.setattr(driver, "start_ray", lambda **how: this_machine())
    monkeypatch.setattr(driver, "_start_recorder", lambda prepared: ran.append(prepared) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        driver.run(driver.RunOptions(recipe="smoke", storage=str(tmp_path)), written)
    assert ran
    text = written.file.getvalue()
    assert said in text
    assert ("RAY_worker_niceness=0 gives them an equal share" in text) == bool(said)
