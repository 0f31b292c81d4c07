"""Reads layers ahead: the next one's tensors, while the one before is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Stored = list[tuple[str, Tensor]]


class ReadAhead:
    """Reads the stored tensors of layers; at most one layer's more than were asked for are in memory.

    Layers are entered in their order, and against it where gradients are computed.
    """

    def __init__(self, read: Callable[[int], Stored], layers: int) -> None:
        """Reads nothing yet.

        Args:
            read: names and tensors of a layer; called from a thread.
            layers: how many there are.
        """
        self._read, self._layers = read, layers
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._last = -1
        self._next: tuple[int, Future[Stored]] | None = None

    def __call__(self, index: int) -> Stored:
        """A layer's names and tensors; raises what `read` does."""
        ahead, self._next = self._next, None
        found = ahead[1].result() if ahead is not None and ahead[0] == index else self._read(index)
        backward = index == self._last - 1 or index == self._last == self._layers - 1
        following, self._last = index + (-1 if backward else 1), index
        if 0 <= following < self._layers:
            self._next = following, self._thread.submit(self._read, following)
        return found
