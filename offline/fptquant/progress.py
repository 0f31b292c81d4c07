"""Progress of long work, reported to whoever wants to show it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from fptquant.errors import FPTQuantError, is_device_lost, is_out_of_memory
from fptquant.files import first_line
from fptquant.process_memory import peak_memory, reset_peak, trim_memory

Item = TypeVar("Item")


@dataclass
class Stages:
    """Names, durations and progress of the stages of a run; silent unless subclassed (see `console`)."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # largest resident size during each, in bytes

    @contextmanager
    def stage(self, name: str, spare_memory: str = "", *, neutral: str = "") -> Iterator[None]:
        """Times one stage.

        Args:
            name: of the stage.
            spare_memory: what makes it need less and changes the result, e.g. "lower --length".
            neutral: what does and leaves the result as it is.

        Raises:
            FPTQuantError: out of memory, or a device failed.
        """
        start = time.perf_counter()
        reset_peak()
        self.begin(name)
        try:
            yield
        except Exception as error:
            if is_device_lost(error):
                raise FPTQuantError(
                    f"the device failed in stage '{name}' ({first_line(error)}): run again to continue, "
                    "on --device cpu if it fails there again"
                ) from None
            if not is_out_of_memory(error):
                raise
            free = "free some memory"
            if type(error).__name__ == "OutOfMemoryError":  # an accelerator's
                free += " on the device, or take --residency streamed or --device cpu"
            remedy = f"{neutral} or {free}" if neutral else free
            remedy += ", and run again to continue" + (f"; or {spare_memory}" if spare_memory else "")
            raise FPTQuantError(f"out of memory in stage '{name}': {remedy}") from None
        finally:
            self.peaks[name] = peak_memory()
            gc.collect()  # models and their hooks refer to each other, and are as large as the next stage's
            trim_memory()
            self.seconds[name] = round(time.perf_counter() - start, 2)
            self.end(name)

    def track(self, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Passes items on and counts them."""
        for item in items:
            yield item
            self.advance(total)

    def begin(self, name: str) -> None:
        """Is told that a stage of this name starts."""

    def advance(self, total: int) -> None:
        """One of `total` steps of the current stage is done."""

    def resume(self, done: int, total: int) -> None:
        """So many steps of the current stage were done by an earlier run, out of `total`."""

    def note(self, text: str) -> None:
        """Something to show beside the progress of the current stage."""

    def end(self, name: str) -> None:
        """Is told that a stage of this name is over."""
