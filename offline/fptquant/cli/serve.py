"""`fptquant serve`: vLLM's server, with what this machine needs."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from fptquant.cli.app import command
from fptquant.cli.options import Checkpoint, require_checkpoint
from fptquant.console import info, out
from fptquant.errors import FPTQuantError

_TURING = (7, 5)  # the newest GPUs without bfloat16


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    checkpoint: Checkpoint,
    show: Annotated[bool, typer.Option("--print", help="print the command and don't run it")] = False,
) -> None:
    """Serve CHECKPOINT with vLLM, an OpenAI-compatible server, in the type that this machine's kernels need.

    Whatever else is given goes to `vllm serve`: fptquant serve OUT --port 8001 --max-model-len 4096.
    """
    require_checkpoint(checkpoint)
    from fptquant.evaluation.vllm_backend import vllm_installed

    if not vllm_installed():
        raise FPTQuantError("vLLM is not installed, so nothing can be served here: run scripts/install.sh")
    from fptquant.weight_files import WeightFiles

    WeightFiles.of(checkpoint.expanduser())  # damaged ones are said here; vLLM takes a minute, and a hundred lines
    line, environment = serve_command(str(checkpoint), *context.args), serve_environment()
    settings = "".join(f"{name}={value} " for name, value in environment.items())
    (out if show else info).print(f"$ {settings}{shlex.join(line)}", markup=False, highlight=False, soft_wrap=True)
    if show:
        return
    os.environ.update(environment)
    sys.stdout.flush()
    os.execvp(line[0], line)


def serve_command(checkpoint: str, *extra: str) -> list[str]:
    """The program and arguments that serve a checkpoint on this machine.

    Args:
        checkpoint: directory.
        extra: further arguments; those of ours that they set are left out.
    """
    from fptquant.evaluation.vllm_backend import on_gpu

    found = [_program(), "serve", checkpoint]
    asked = {argument.partition("=")[0] for argument in extra}
    if "--quantization" not in asked:
        found += ["--quantization", "fptquant"]
    if "--dtype" not in asked:
        if not on_gpu():
            found += ["--dtype", "float32"]  # vLLM takes 16 bits otherwise
        elif _capability() <= _TURING:
            found += ["--dtype", "float16"]
    return [*found, *extra]


def serve_environment() -> dict[str, str]:
    """What vLLM should find in its environment on this machine; without what the user has set.

    On CPUs, vLLM 0.32 can't load the graphs that it stores ahead of time, and compiles for minutes at every start.
    Without them torch's own cache serves from the second start on.
    """
    from fptquant.evaluation.vllm_backend import on_gpu

    wanted = {} if on_gpu() else {"VLLM_USE_AOT_COMPILE": "0"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _program() -> str:
    """The program `vllm`, by the name that the user's shell knows; else the one beside this Python."""
    beside = Path(sys.executable).parent / "vllm"
    known = shutil.which("vllm")
    if beside.is_file() and (known is None or not os.path.samefile(known, beside)):
        return str(beside)
    return "vllm"


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()
