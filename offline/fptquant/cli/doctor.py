"""`fptquant doctor`."""

from __future__ import annotations

import typer

from fptquant.cli.app import command
from fptquant.console import grid, out
from fptquant.errors import FPTQuantError


@command()
def doctor() -> None:
    """Show what this machine would serve with, and compare its kernels with the format; exit status 1 on a failure."""
    from fptquant.evaluation.vllm_backend import vllm_installed

    if not vllm_installed():
        raise FPTQuantError("vLLM is not installed, so nothing can be served here: run scripts/install.sh")
    from vllm_fptquant import doctor as examination

    for name, version in examination.versions().items():
        out.print(f"{name} {version}", highlight=False)
    out.print(f"device: {examination.device_name()}", highlight=False)
    shown = grid("layer", "kernel", "", "result", "")
    failed = False
    for result in examination.check_kernels():
        failed |= result.status == "fail"
        shown.add_row(result.layer, result.kernel, "serves" if result.chosen else "", result.status, result.detail)
    out.print(shown)
    if failed:
        raise typer.Exit(1)
