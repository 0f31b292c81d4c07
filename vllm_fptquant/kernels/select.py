"""Which kernel computes a layer."""

from __future__ import annotations

from fptquant.errors import FPTQuantError, unknown
from vllm_fptquant.kernels.base import Kernel, LinearSpec
from vllm_fptquant.kernels.cutlass_int8 import CutlassInt8Kernel
from vllm_fptquant.kernels.experts import MarlinExperts, MarlinInt8Experts
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.humming import HummingInt4Kernel, HummingInt8Kernel
from vllm_fptquant.kernels.marlin import MarlinInt8Kernel, MarlinKernel
from vllm_fptquant.kernels.marlin_cutlass import MarlinCutlassKernel
from vllm_fptquant.kernels.onednn import OnednnKernel
from vllm_fptquant.kernels.reference import ReferenceKernel
from vllm_fptquant.kernels.triton_int8 import TritonInt8Kernel

# Of each device, best first; the first that can compute a layer gets it. Humming is for those who ask for it: it rounds
# once more than the others, compiles dozens of kernels at the first start, and its gain was never measured.
KERNELS: tuple[type[Kernel], ...] = (
    MarlinCutlassKernel,
    MarlinInt8Kernel,
    CutlassInt8Kernel,
    TritonInt8Kernel,
    HummingInt4Kernel,
    HummingInt8Kernel,
    MarlinKernel,
    MarlinInt8Experts,
    MarlinExperts,
    OnednnKernel,
    FbgemmKernel,
    ReferenceKernel,
)


def select_kernel(spec: LinearSpec, override: str | None, layer: str) -> tuple[type[Kernel], str]:
    """Chooses a kernel and says why.

    Args:
        spec: the layer.
        override: kernel name the user asked for, or several with commas between; None to choose.
        layer: name for error messages.

    Raises:
        FPTQuantError: unknown name, or no kernel (or none of those asked for) can compute the layer.
    """
    refusals = {kernel.name: kernel.can_implement(spec) for kernel in KERNELS}
    able = [kernel for kernel in KERNELS if refusals[kernel.name] is None]
    if override is not None:
        names = [name.strip() for name in override.split(",")]
        for name in names:
            if name not in refusals:
                raise unknown("kernel", name, refusals)
        for name in names:
            for kernel in able:
                if kernel.name == name:
                    return kernel, "asked for by additional_config"
        reasons = "; ".join(f"'{name}' cannot compute {layer}: {refusals[name]}" for name in names)
        others = ", ".join(kernel.name for kernel in able) or "none"
        raise FPTQuantError(f"kernel {reasons}; kernels that can: {others}")
    here = [kernel for kernel in KERNELS if kernel.device == spec.device and kernel.experts == spec.experts]
    if not able:
        reasons = "; ".join(f"{kernel.name}: {refusals[kernel.name]}" for kernel in here)
        raise FPTQuantError(f"no kernel can compute {layer} ({reasons or f'none runs on {spec.device}'})")
    skipped = [f"{kernel.name}: {refusals[kernel.name]}" for kernel in here[: here.index(able[0])]]
    return able[0], f"not {'; not '.join(skipped)}" if skipped else "the first choice here"
