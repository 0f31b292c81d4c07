"""What the command shows: progress bars and tables."""

from __future__ import annotations

import io
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from fptquant.errors import FPTQuantError
from fptquant.files import first_line, require_writable
from fptquant.progress import Stages
from fptquant.units import duration, megabytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fptquant.loading import Source
    from fptquant.run.job import Job

_WIDE = 160  # columns of the log file


class _Logged(Console):
    """A console whose output is in the log file, too."""

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console.print`; what a quiet console doesn't show is logged all the same."""
        log(*objects)
        super().print(*objects, **options)


out = _Logged()  # results, which are shown in any case
info = _Logged()  # what is said beside them
err = _Logged(stderr=True)  # notes and progress
_log: TextIO | None = None
_verbose = False


def configure(*, quiet: bool = False, verbose: bool = False, log_file: Path | None = None) -> None:
    """Says how much is shown, from now on.

    Args:
        quiet: results and errors only.
        verbose: what libraries log, and where errors come from, too.
        log_file: gets a copy of all that is said, quiet or not, with times.

    Raises:
        FPTQuantError: the log file can't be written.
    """
    global _log, _verbose
    close()
    info.quiet = err.quiet = quiet
    _verbose = verbose
    if verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    if log_file is not None:
        require_writable("--log-file", log_file)
        try:
            _log = log_file.open("a", encoding="utf-8")
        except OSError as error:
            raise FPTQuantError(f"--log-file: '{log_file}' can't be written to: {first_line(error)}") from None


def close() -> None:
    """Closes the log file, and shows everything again."""
    global _log, _verbose
    if _log is not None:
        _log.close()
    _log, _verbose = None, False
    info.quiet = err.quiet = False


def verbose() -> bool:
    """Whether everything is to be shown."""
    return _verbose


def log(*objects: Any) -> None:
    """Appends to the log file, where there is one; a time in front of each line."""
    if _log is None:
        return
    text = io.StringIO()
    plain = all(isinstance(shown, str) for shown in objects)
    Console(file=text, width=_WIDE, color_system=None).print(*objects, soft_wrap=plain, markup=False)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    _log.writelines(f"{now} {line}\n" for line in text.getvalue().splitlines())
    _log.flush()


def complain(line: str, error: BaseException | None = None, *, style: str | None = "red") -> None:
    """Shows a line about what ends the command, quiet or not; of an error, where it comes from if that is asked for."""
    quiet, err.quiet = err.quiet, False
    if error is not None and _verbose:
        import traceback

        err.print("".join(traceback.format_exception(error)), markup=False, highlight=False, soft_wrap=True)
    err.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    err.quiet = quiet


def grid(*columns: str, **options: Any) -> Table:
    """A table that folds what is too long for it, and never cuts it off."""
    found = Table(**options)
    for column in columns:
        found.add_column(column, overflow="fold")
    return found


def facts() -> Table:
    """A table of names and values without a header."""
    return grid("", "", show_header=False)


class _Times(ProgressColumn):
    """How long a stage has taken and will take."""

    def render(self, task: Task) -> Text:
        """`12 s so far, about 40 s left`."""
        left = task.time_remaining
        text = f"{duration(task.finished_time or task.elapsed or 0)}"
        if task.finished:
            return Text(text)
        return Text(f"{text} so far" + ("" if left is None else f", about {duration(left)} left"))


class RichStages(Stages):
    """Shows each stage as a progress bar, its number among all, and about how long all will take."""

    def __init__(self, expected: Mapping[str, float] | None = None) -> None:
        """Args: expected seconds of each stage that is known to come, in order."""
        super().__init__()
        self._expected = dict(expected or {})

    def begin(self, name: str) -> None:
        """Starts a bar; the total is known with the first step."""
        columns = (SpinnerColumn(), TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
        note, rest = TextColumn("{task.fields[note]}"), TextColumn("{task.fields[rest]}")
        console = Console(stderr=True, quiet=err.quiet)
        self._bar = Progress(*columns, _Times(), note, rest, console=console)
        names = list(self._expected)
        number = f"[{names.index(name) + 1}/{len(names)}] " if name in names else ""
        log(f"{number}{name} begins; {self._all_left(name)}".rstrip("; "))
        self._bar.start()
        self._task = self._bar.add_task(escape(f"{number}{name}"), total=None, note="", rest=self._all_left(name))

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
        self._bar.update(self._task, total=task.total or 1, completed=task.completed or 1, rest="")
        self._bar.stop()
        log(f"{name}: {self.seconds[name]:.1f} s, peak memory {megabytes(self.peaks[name])}")

    def _all_left(self, name: str) -> str:
        """About how long this stage and those behind it take, at the speed of those that are over."""
        names = list(self._expected)
        if name not in names:
            return ""
        done = [stage for stage in self.seconds if stage in self._expected]
        planned = sum(self._expected[stage] for stage in done)
        speed = sum(self.seconds[stage] for stage in done) / planned if planned > 60 else 1.0
        left = sum(self._expected[stage] for stage in names[names.index(name) :]) * speed
        return f"all stages: about {duration(left)} left"


def plan_table(job: Job, expected: Mapping[str, float]) -> Table:
    """What a run is about to do, and what it is expected to take (`fptquant.run.times`)."""
    from fptquant.devices import CPU, free_memory
    from fptquant.report.inspection import in_words
    from fptquant.run.chats import chats_of
    from fptquant.run.needs import expected_disk, expected_host_memory, expected_memory
    from fptquant.run.sink import sink_obstacle
    from fptquant.run.sizes import bits_per_weight

    shape = job.source.architecture.shape(job.source.config)
    config = job.config

    table = facts()
    experts = f", {shape.experts} experts, {shape.chosen} for a token" if shape.mixtures else ""
    sizes = f"{shape.layers} layers, hidden {shape.hidden}{experts}"
    table.add_row("architecture", f"{job.source.kind}, {sizes}")
    table.add_row("recipe", f"{job.recipe.name} (seed {job.recipe.seed}, rounding {job.recipe.rounding.method})")
    stored = bits_per_weight(job.source, config, job.dtype)
    table.add_row("weights", f"{in_words(config.weights)}; {stored:.2f} bits for each on average")
    table.add_row("activations", in_words(config.activations))
    table.add_row("KV cache", in_words(config.kv_cache))
    head = config.scheme_for(job.source.architecture.head)
    quantized = f"{in_words(head.weights)}; input INT{head.activations.bits}" if head else "not quantized"
    table.add_row("head", f"{quantized}{_tying(job)}")
    if job.recipe.budget is not None:
        table.add_row("budget", ", ".join(f"{k} {v}" for k, v in job.recipe.budget if v is not None))
    table.add_row("transforms", ", ".join(job.transforms.names) or "none")
    for name, why in job.left_out.items():
        table.add_row("left out", f"{name}: {why}")
    if not job.transforms.folds_gains:
        table.add_row("norms", "keep their gains, which only T_r and S_n need in the weights")
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
    if chats := len(chats_of(job)):
        calibration += f", {chats} of them chats that the model answers itself"
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
    table.add_row(
        "time", f"about {duration(sum(expected.values()))} in all, give or take a factor of two, beside no other work"
    )
    return table


def _tying(job: Job) -> str:
    """What becomes of a head that has the embedding's weight."""
    from fptquant.run.head import untied_by, was_tied

    if not was_tied(job.source):
        return ""
    reason = untied_by(job.source, job.config, job.transforms)
    return "; has the embedding's weight" if reason is None else f"; gets a weight of its own: {reason}"


def needs_table(job: Job, expected: Mapping[str, float]) -> Table:
    """What each stage of a run is expected to take."""
    from fptquant.run.needs import expected_needs

    where = "memory" if job.device.type == "cpu" else f"memory of {job.device}"
    needs = expected_needs(job, job.residency, job.room)
    found = grid("stage", where, "reads", "time")
    for name, seconds in expected.items():
        need = needs.get(name)
        reads = f"{need.reads / 1e9:,.1f} GB" if need and need.reads else ""
        found.add_row(name, f"{need.memory / 1e9:.1f} GB" if need else "", reads, f"about {duration(seconds)}")
    return found


def show_notes(source: Source) -> None:
    """What is odd about a source and may be meant."""
    for note in source.notes:
        err.print(f"note: '{source.path}': {note}", markup=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """Text with everything that would move the cursor or can't be seen as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
