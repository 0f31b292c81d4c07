"""A checkpoint's tensors against the configuration that vLLM computes with (`fptquant.checkpoint.binding`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from vllm.logger import init_logger

from fptquant.checkpoint.binding import UNBOUND, Binding, Watch
from fptquant.checkpoint.checks import require_consistent
from fptquant.errors import FPTQuantError

logger = init_logger(f"vllm.{__name__}")


def require_bound_config(vllm_config: Any) -> None:
    """Compares the configuration in effect, with what the user overrides at start, before the model is built.

    Only where the checkpoint is a local directory; files that come later are left to `require_bound_tensors`.

    Raises:
        FPTQuantError: names the field; or a weight file is truncated.
    """
    model, checkpoint = vllm_config.model_config, vllm_config.quant_config.checkpoint
    require_consistent(checkpoint, model.hf_config)
    files = sorted(Path(model.model).glob("*.safetensors"))
    try:
        binding = Binding.of_files(files)
    except (SafetensorError, OSError) as error:
        raise FPTQuantError(f"'{model.model}' holds a corrupt or truncated file ({error}): fetch it again") from None
    if binding is not None:
        binding.require_config(model.hf_config, checkpoint)


def require_bound_tensors(watch: Watch, vllm_config: Any) -> None:
    """Compares the tensors that were loaded, and the configuration again; warns of a checkpoint that isn't bound.

    Raises:
        FPTQuantError: a tensor or field differs, or the binding is missing.
    """
    model, checkpoint = vllm_config.model_config, vllm_config.quant_config.checkpoint
    if not watch.require_bound(model.hf_config, checkpoint):
        logger.warning_once(UNBOUND, model.model)
