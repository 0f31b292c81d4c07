"""Reads the Dockerfiles of docker/: the instructions that they use, and no others."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

_KNOWN = ("FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, and what stands behind it on one line."""

    name: str
    value: str


@dataclass
class Image:
    """What the last instructions say of the finished image."""

    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def apply(self, step: Instruction) -> None:
        """Takes up an instruction; those that change files (RUN, COPY) change nothing here."""
        if step.name == "ENV":
            self.env |= dict(assignment.split("=", 1) for assignment in shlex.split(step.value))
        elif step.name == "WORKDIR":
            self.workdir = step.value
        elif step.name == "USER":
            self.user = step.value
        elif step.name == "ENTRYPOINT":
            self.entrypoint = json.loads(step.value)
        elif step.name == "CMD":
            self.command = json.loads(step.value)
        elif step.name == "HEALTHCHECK":
            self.healthcheck = json.loads(step.value.partition("CMD")[2])


def read(file: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, in order.

    Args:
        file: the Dockerfile, of a single stage.

    Raises:
        ValueError: an instruction that isn't known here, or a form of it: a check must not pass over it.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        if name not in _KNOWN:
            raise ValueError(f"{file.name}: '{name}' is not known here")
        if name in ("ENTRYPOINT", "CMD") and not value.startswith("["):
            raise ValueError(f"{file.name}: {name} is no list, so a shell would run it")
        if name in ("RUN", "COPY") and value.startswith("-"):
            raise ValueError(f"{file.name}: options of {name} are not known here")
        if name == "HEALTHCHECK" and not re.search(r"CMD \[", value):
            raise ValueError(f"{file.name}: HEALTHCHECK has no command as a list")
        found.append(Instruction(name, value))
    if [step.name for step in found].count("FROM") != 1 or found[0].name != "FROM":
        raise ValueError(f"{file.name}: not exactly one FROM, in front")
    return found


def image(steps: list[Instruction]) -> Image:
    """What the finished image would be."""
    found = Image()
    for step in steps:
        found.apply(step)
    return found
