"""vLLM plugin that serves checkpoints in format "fptquant" on a stock vLLM.

Importing this package costs nothing: vLLM, torch and the kernels are imported when they are needed.
"""

from __future__ import annotations

__version__ = "0.1.0"

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`: registers the quantization method and the residual-scaled models.

    vLLM calls it once in every process it starts; calling it again does nothing. Models are registered by
    name, so that neither they nor the kernels are imported here, and no device is touched.

    Raises:
        FPTQuantError: this package is installed in two versions at once.
    """
    global _registered
    if _registered:
        return

    from vllm_fptquant.versions import check_versions

    check_versions()  # imports fptquant, by which transformers knows the checkpoints' model_type

    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry

    from fptquant.format import QUANT_METHOD, quantized_architecture
    from fptquant.wiring import FAMILIES
    from vllm_fptquant.config import FPTQuantConfig

    register_quantization_config(QUANT_METHOD)(FPTQuantConfig)
    for family in FAMILIES.values():
        name = quantized_architecture(family.class_name)
        ModelRegistry.register_model(name, "vllm_fptquant.models.decoder:FPTQuantForCausalLM")
    _registered = True
