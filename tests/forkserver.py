"""Processes of their own that start at once: forks of one that has imported what they need and computed nothing.

A Python that imports torch, transformers and vLLM takes 6 to 18 seconds. A fork of the test's own process would take
over what tests before it left: threads, which aren't there then, and memory.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from fptquant.cli import main

IMPORTS = "tests.forkserver_imports"


def context() -> ForkServerContext:
    """Multiprocessing whose processes start so. The first of a test process starts the server: they share it."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([IMPORTS])
    return found


def run(
    target: Callable[..., Any], *arguments: object, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Calls a function in such a process, as `subprocess.run` does a program.

    Args:
        target: of a module, by whose name it is found again; its SystemExit is the process's status.
        arguments: of it.
        timeout: seconds.
        environment: variables beside those of this process.

    Raises:
        subprocess.TimeoutExpired: it was ended then.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        variables = {**os.environ, **environment}
        process = context().Process(target=_call, args=(target, arguments, variables, os.getcwd(), *files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(target.__name__, timeout)
        said = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
    return subprocess.CompletedProcess([target.__name__, *map(str, arguments)], process.exitcode, *said)


def fptquant(*arguments: object) -> None:
    """The command, in this process."""
    sys.argv = ["fptquant", *map(str, arguments)]
    main()


def _call(
    target: Callable[..., Any],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    directory: str,
    stdout: Path,
    stderr: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    target(*arguments)
