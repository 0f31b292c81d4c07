"""Model classes of quantized checkpoints in transformers, registered with its Auto classes on import."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from fptquant.errors import FPTQuantError
from fptquant.format.binding import BINDING
from fptquant.hf_config import FPTQuantLlamaConfig


class FPTQuantLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """`LlamaForCausalLM` that the quantizer turns into the simulation of what vLLM serves."""

    config_class = FPTQuantLlamaConfig
    _keys_to_ignore_on_load_unexpected = [f"^{BINDING}$"]  # the quantizer has read it by then

    def __init__(self, config: FPTQuantLlamaConfig, *arguments: Any, **options: Any) -> None:
        """Takes `LlamaForCausalLM`'s arguments.

        Raises:
            FPTQuantError: the configuration has lost its quantization.
        """
        if getattr(config, "quantization_config", None) is None:
            raise FPTQuantError(
                f"config.json: model_type is '{config.model_type}', but there is no quantization_config: "
                "fetch the checkpoint again, or quantize again"
            )
        super().__init__(config, *arguments, **options)


class FPTQuantLlamaModel(LlamaModel):  # type: ignore[misc]
    """What `AutoModel` finds, so that it can say what to use."""

    config_class = FPTQuantLlamaConfig

    def __init__(self, config: FPTQuantLlamaConfig, *arguments: Any, **options: Any) -> None:
        """Raises FPTQuantError: a checkpoint holds a whole language model, with its head."""
        raise FPTQuantError("load an fptquant checkpoint with AutoModelForCausalLM, and take its `.model`")


AutoModelForCausalLM.register(FPTQuantLlamaConfig, FPTQuantLlamaForCausalLM, exist_ok=True)
AutoModel.register(FPTQuantLlamaConfig, FPTQuantLlamaModel, exist_ok=True)
