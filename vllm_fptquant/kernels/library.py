"""The plugin's own operators, `torch.ops.fptquant`: the compiler does not look into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library: Any = torch.library.Library("fptquant", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], device: str = "CUDA") -> None:
    """Registers an operator.

    Args:
        schema: name, arguments and result, as torch writes them: `"f(Tensor x) -> Tensor"`.
        implementation: what it computes on `device`.
        fake: shape and type of the result alone, for traces.
        device: a dispatch key of torch, `"CUDA"` or `"CPU"`.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, device)
    torch.library.register_fake(f"fptquant::{name}", fake, lib=_library)
