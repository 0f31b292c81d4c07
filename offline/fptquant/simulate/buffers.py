"""Modules whose buffers keep their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose buffers keep their types when it is cast, as by `model.to(torch.bfloat16)`.

    Scales and constants fix integers, and 16 bits do not hold them; they move between devices as any buffer does.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
