"""The `cascade` command in this process."""

import io
import os
import signal
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def in_process(*arguments: str, cwd: Path, on_ray: bool = False) -> Done:
    """The command by its entry point and in this process: a new one imports for seconds, and starts Ray for more.

    Args:
        on_ray: with the suite's Ray (`ray_cluster`) in place of one of its own.
    """
    from pipelines.command.cli import main

    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(sys, "argv", ["cascade", *arguments]))
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.getsignal(number))
        for context in (chdir(cwd), redirect_stdout(out), redirect_stderr(err)):
            stack.enter_context(context)
        if on_ray:
            import ray

            from pipelines.command import data
            from pipelines.engine import driver
            from pipelines.planning.profiles import found_cluster

            stack.enter_context(mock.patch.object(ray, "shutdown"))
            for module in (driver, data):
                stack.enter_context(mock.patch.object(module, "start_ray", return_value=found_cluster(here=True)))
        ended = stack.enter_context(pytest.raises(SystemExit))
        main()
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def finished(*arguments: str, cwd: Path) -> Done:
    """The command in this process, which ends with exit code 0."""
    done = in_process(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done
