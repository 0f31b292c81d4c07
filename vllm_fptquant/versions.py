"""What is installed beside the plugin, looked at once, when vLLM starts.

Between vLLM 0.31 and 0.33 nothing that the plugin uses changed its name or arguments, so no module asks for a version.
"""

from __future__ import annotations

import multiprocessing

TESTED = ("0.31", "0.32", "0.33")  # releases of vLLM that it was run with: 0.33 on a GPU, the others on CPUs


def check_versions() -> None:
    """Warns of a vLLM that the plugin was never run with, once and not in every process that vLLM starts.

    Raises:
        FPTQuantError: the two halves of the package are of different versions.
    """
    import fptquant
    import vllm_fptquant
    from fptquant.errors import FPTQuantError

    if fptquant.__version__ != vllm_fptquant.__version__:
        raise FPTQuantError(
            f"vllm_fptquant {vllm_fptquant.__version__} ({vllm_fptquant.__path__[0]}) and fptquant "
            f"{fptquant.__version__} ({fptquant.__path__[0]}) are halves of one package, but of different versions: "
            "uninstall vllm-fptquant until pip finds none, and install it again"
        )
    import vllm
    from vllm.logger import init_logger

    if not vllm.__version__.startswith(tuple(f"{release}." for release in TESTED)) and is_first_process():
        init_logger(f"vllm.{__name__}").warning(
            "vllm-fptquant %s was tested with vLLM %s, not with %s: compare what it serves with `fptquant verify`",
            vllm_fptquant.__version__,
            " and ".join((", ".join(TESTED[:-1]), TESTED[-1])),
            vllm.__version__,
        )


def is_first_process() -> bool:
    """Whether this is the process that the user started, and none of vLLM's own."""
    return multiprocessing.parent_process() is None


def require_extension() -> None:
    """Refuses a vLLM whose compiled extension didn't load: it would fail later, at whatever needs it first.

    Raises:
        FPTQuantError: names the remedy.
    """
    import torch
    from vllm.platforms import current_platform

    from fptquant.errors import FPTQuantError

    current_platform.import_kernels()  # logs why, where it fails
    if not hasattr(torch.ops._C, "silu_and_mul"):
        raise FPTQuantError(
            f"vLLM's compiled extension for '{current_platform.device_type}' can't be loaded (vLLM's warning above "
            "says why): install the build of vLLM that fits this machine and its torch again"
        )
