"""What the command shows: progress bars and tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fptquant.progress import Stages

if TYPE_CHECKING:
    from fptquant.loading import Source
    from fptquant.run.job import Job

err = Console(stderr=True)
out = Console()


class RichStages(Stages):
    """Shows each stage as a progress bar."""

    def begin(self, name: str) -> None:
        """Starts a bar; the total is known with the first step."""
        columns = (SpinnerColumn(), TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), note, console=err)
        self._bar.start()
        self._task = self._bar.add_task(name, total=None, note="")

    def advance(self, total: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, total=total, advance=1)

    def resume(self, done: int, total: int) -> None:
        """Starts the bar where an earlier run stopped."""
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Shows the loss."""
        self._bar.update(self._task, note=text)

    def end(self, name: str) -> None:
        """Completes the bar and leaves it on the screen."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, total=task.total or 1, completed=task.completed or 1)
        self._bar.stop()


def plan_table(job: Job, output: Path) -> Table:
    """What a run is about to do."""
    from fptquant.devices import CPU, free_memory
    from fptquant.run.job import sink_obstacle
    from fptquant.run.needs import expected_disk, expected_host_memory, expected_memory

    shape = job.source.architecture.shape(job.source.config)
    config = job.config

    def bits(scheme: Any) -> str:
        if scheme.bits == 16:
            return "not quantized"
        return f"static INT{scheme.bits}, {'symmetric' if scheme.symmetric else 'asymmetric'}, per {scheme.strategy}"

    table = Table(title=escape(f"plan: {job.source.path} -> {output}"), show_header=False)
    experts = f", {shape.experts} experts, {shape.chosen} for a token" if shape.mixtures else ""
    sizes = f"{shape.layers} layers, hidden {shape.hidden}{experts}"
    table.add_row("architecture", f"{job.source.kind}, {sizes}")
    table.add_row("recipe", f"{job.recipe.name} (seed {job.recipe.seed}, rounding {job.recipe.rounding.method})")
    table.add_row("weights", bits(config.weights))
    table.add_row("activations", bits(config.activations))
    table.add_row("KV cache", bits(config.kv_cache))
    head = config.scheme_for(job.source.architecture.head)
    quantized = f"{bits(head.weights)}; input INT{head.activations.bits}" if head else "not quantized"
    table.add_row("head", f"{quantized}{_tying(job)}")
    if job.recipe.budget is not None:
        table.add_row("budget", ", ".join(f"{k} {v}" for k, v in job.recipe.budget if v is not None))
    table.add_row("transforms", ", ".join(job.transforms.names) or "none")
    for name, why in job.left_out.items():
        table.add_row("left out", f"{name}: {why}")
    if config.sink:
        first = job.source.tokenizer.convert_ids_to_tokens(config.sink.token)
        table.add_row("first token", escape(f"constant where it is {first}"))
    elif job.recipe.sink == "auto" and (obstacle := sink_obstacle(job.source, job.recipe)):
        table.add_row("first token", f"not constant: {obstacle}")
    if config.transforms.down_hadamard:
        table.add_row("T_d block", str(config.transforms.down_hadamard.block))
    if config.transforms.input_hadamard:
        blocks = (f"{block} at {group}" for group, block in config.transforms.input_hadamard if block is not None)
        table.add_row("T_h blocks", ", ".join(blocks))
    count, length = job.windows.shape
    calibration = f"{job.recipe.calibration.source}: {count} sequences of {length} tokens"
    table.add_row("calibration", escape(calibration))
    text = job.source.tokenizer.decode(job.windows[0].tolist(), clean_up_tokenization_spaces=False)
    table.add_row("first sequence", escape(visible(text[:80])))
    if job.training_windows.numel():
        count, length = job.training_windows.shape
        table.add_row("training", f"{count} sequences of {length} tokens")
    if any(steps := [job.recipe.local.steps, job.recipe.end_to_end.steps, job.recipe.scales.steps]):
        table.add_row("steps", "{} on weights, {} end to end, {} of scales".format(*steps))
    if job.recipe.codes.steps:
        table.add_row("steps of a layer", f"{job.recipe.codes.steps} of codes")
    routers = ", routers" if shape.mixtures else ""
    table.add_row("kept in", f"{job.dtype}: embedding, norms, biases{routers}")
    table.add_row("expected size", megabytes(job.output_bytes))
    disk = ", ".join(f"{name} {megabytes(size)}" for name, size in expected_disk(job).items() if size)
    table.add_row("disk", f"{disk}, until it is finished")
    table.add_row("device", str(job.device))

    def memory(needed: int, free: int) -> str:
        warning = f", more than the {free / 1e9:.1f} GB that are free" if needed > free else ""
        return f"about {needed / 1e9:.1f} GB{warning}"

    how = "the whole model" if job.residency == "resident" else "a layer at a time"
    needed = memory(expected_memory(job, job.residency, job.room), free_memory(job.device))
    if job.device != CPU:
        table.add_row("memory of the machine", memory(expected_host_memory(job), free_memory(CPU)))
    table.add_row("memory" if job.device == CPU else "memory of the device", f"{needed}, {how} ({job.residency})")
    return table


def _tying(job: Job) -> str:
    """What becomes of a head that has the embedding's weight."""
    from fptquant.run.head import untied_by, was_tied

    if not was_tied(job.source):
        return ""
    reason = untied_by(job.source, job.config, job.transforms)
    return "; has the embedding's weight" if reason is None else f"; gets a weight of its own: {reason}"


def needs_table(job: Job) -> Table:
    """What each stage of a run is expected to take."""
    from fptquant.run.needs import expected_needs

    where = "memory" if job.device.type == "cpu" else f"memory of {job.device}"
    table = Table("stage", where, "reads", title="expected")
    for name, need in expected_needs(job, job.residency, job.room).items():
        table.add_row(name, f"{need.memory / 1e9:.1f} GB", f"{need.reads / 1e9:,.1f} GB" if need.reads else "")
    return table


def show_notes(source: Source) -> None:
    """What is odd about a source and may be meant."""
    for note in source.notes:
        err.print(f"note: '{source.path}': {note}", markup=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """Text with everything that would move the cursor or can't be seen as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def megabytes(count: int) -> str:
    """A number of bytes, to be read."""
    return f"{count / 1e6:,.0f} MB"
