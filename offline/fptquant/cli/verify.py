"""`fptquant verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fptquant.calibration.formats import require_text
from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import Checkpoint, Device, require_checkpoint
from fptquant.console import err, grid, out
from fptquant.files import require_original


@command()
def verify(
    checkpoint: Checkpoint,
    against: Annotated[str, typer.Option(help="the original model: a directory, or a hub name")],
    text: Annotated[
        Path | None, typer.Option(show_default="the shipped calibration text", help="text to compare on")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="windows of the text to compare on")] = 4,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window")] = 256,
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="compare through vLLM too, when installed")] = True,
    device: Device = "auto",
) -> None:
    """Check that a checkpoint is what it claims to be; exit status 1 when a figure is out of tolerance."""
    require_checkpoint(checkpoint)
    require_original(against)
    if text is not None:
        require_text(text)

    from fptquant.devices import CPU, choose_device
    from fptquant.evaluation.vllm_backend import VLLMEngine, on_gpu, vllm_installed

    vllm = vllm and vllm_installed()
    # vLLM wants nearly all of a GPU's memory for itself
    place = CPU if device == "auto" and vllm and on_gpu() else choose_device(device)

    from importlib import resources

    from fptquant.evaluation.equivalence import (
        check_function_preserved,
        check_greedy,
        check_read_back,
        check_recorded,
        check_served,
        check_served_exactly,
        check_unaltered,
    )
    from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
    from fptquant.loading import open_source
    from fptquant.run.job import job_of
    from fptquant.simulate.install import set_exact

    quiet_transformers()
    open_source(checkpoint).require_length("--length", length, generated=int(vllm))
    job = job_of(checkpoint, against, device=place)
    if text is None:
        text = Path(str(resources.files("fptquant") / "data" / "wiki.calib.txt"))
    tokens = evaluation_windows(job.source.tokenizer, text, windows, length).to(place)
    checks = [check_unaltered(checkpoint)]
    with err.status("original and transformed model"):
        check, transformed = check_function_preserved(job, tokens)
        checks.append(check)
    with err.status("simulated model and checkpoint read back"):
        check, simulated = check_read_back(job, transformed, checkpoint, tokens)
        checks += [check, check_recorded(simulated, checkpoint)]
    if vllm:
        with err.status("vLLM, as users run it"):
            engine = VLLMEngine(checkpoint, length + 1)
            checks.append(check_served(transformers_scorer(simulated), engine.score, tokens))
            engine.close()
        if job.config.kv_cache.bits < 16 and not on_gpu():
            with err.status("vLLM, exact mode"):
                set_exact(simulated)
                engine = VLLMEngine(checkpoint, length + 1, exact=True)
                checks.append(check_served_exactly(transformers_scorer(simulated), engine.score, tokens))
                checks.append(check_greedy(simulated, engine, tokens[:, : length // 2], new_tokens=16))
                engine.close()
    shown = grid("check", "measured", "limit", "")
    for check in checks:
        shown.add_row(check.name, check.measured, check.limit, "ok" if check.passed else "FAILED")
    out.print(f"{checkpoint} on {windows} windows of {length} tokens", markup=False, highlight=False, soft_wrap=True)
    out.print(shown)
    if not vllm:
        out.print("through vLLM: not checked" + ("" if vllm_installed() else " (vLLM is not installed)"))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
