"""Runs a command and says what it took: time, memory and disk. Linux only, from /proc."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Usage:
    """What one process took. Sizes in bytes, without its children."""

    seconds: float
    cpu: float  # seconds of all threads, in user and system: hardly changed by what else the machine does
    peak: int  # resident, as the kernel keeps it (VmHWM), pages of mapped files included
    anonymous: int  # largest RssAnon seen: what has to fit into memory
    mapped: int  # largest RssFile seen: pages of mapped files, which the system may drop
    read: int  # from the disk; what the page cache had is not in it
    written: int  # to the page cache, and so to the disk
    status: int  # exit status, negative for a signal
    stopped: bool  # because it took more than the limit


def watch(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None, limit: int | None = None
) -> Usage:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        log: file that takes what it prints.
        environment: variables in addition to this process's.
        limit: anonymous bytes above which it is killed, so that the machine stays usable.
    """
    anonymous = mapped = peak = 0
    stopped = False
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        # the ended process stays a zombie until it was read: its counters are complete then
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            memory = _fields(process.pid, "status")
            peak = max(peak, memory.get("VmHWM", 0))
            anonymous = max(anonymous, memory.get("RssAnon", 0))
            mapped = max(mapped, memory.get("RssFile", 0))
            if limit is not None and anonymous > limit and not stopped:
                process.kill()
                stopped = True
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        disk = _fields(process.pid, "io")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        process.kill()  # of no effect on a process that has ended
        process.wait()
    return Usage(
        seconds=round(seconds, 2),
        cpu=round(used.ru_utime + used.ru_stime, 2),
        peak=peak,
        anonymous=anonymous,
        mapped=mapped,
        read=disk["read_bytes"],
        written=disk["write_bytes"],
        status=process.returncode,
        stopped=stopped,
    )


def _fields(pid: int, file: str) -> dict[str, int]:
    """Numbers of /proc/PID/FILE by name; those in kB as bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdecimal():
            found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


def forget(directory: Path) -> None:
    """Drops a model's files from the page cache, so that reading them counts."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
