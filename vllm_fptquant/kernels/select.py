"""Which kernel computes a layer."""

from __future__ import annotations

from fptquant.errors import FPTQuantError, unknown
from vllm_fptquant.kernels.base import Kernel, LinearSpec
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.reference import ReferenceKernel

# Fastest first; the first that can compute a layer exactly gets it.
KERNELS: tuple[type[Kernel], ...] = (FbgemmKernel, ReferenceKernel)


def select_kernel(spec: LinearSpec, override: str | None, layer: str) -> tuple[type[Kernel], str]:
    """Chooses a kernel and says why.

    Args:
        spec: the layer.
        override: kernel name the user asked for, None to choose.
        layer: name for error messages.

    Raises:
        FPTQuantError: unknown name, or no kernel (or not the one asked for) can compute the layer.
    """
    refusals = {kernel.name: kernel.can_implement(spec) for kernel in KERNELS}
    able = [kernel for kernel in KERNELS if refusals[kernel.name] is None]
    if override is not None:
        chosen = next((kernel for kernel in KERNELS if kernel.name == override), None)
        if chosen is None:
            raise unknown("kernel", override, refusals)
        if chosen not in able:
            others = ", ".join(kernel.name for kernel in able) or "none"
            raise FPTQuantError(
                f"kernel '{override}' cannot compute {layer}: {refusals[override]}; kernels that can: {others}"
            )
        return chosen, "asked for by additional_config"
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise FPTQuantError(f"no kernel can compute {layer} ({reasons})")
    skipped = [f"{kernel.name}: {refusals[kernel.name]}" for kernel in KERNELS[: KERNELS.index(able[0])]]
    return able[0], f"not {'; not '.join(skipped)}" if skipped else "the fastest here"
