"""Model classes of quantized checkpoints in transformers, registered with its Auto classes on import.

Each family has two in this module, FPTQuantLlamaForCausalLM and FPTQuantLlamaModel for Llama.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from fptquant.errors import FPTQuantError
from fptquant.format import quantized_architecture
from fptquant.format.binding import BINDING
from fptquant.hf_config import CONFIGS
from fptquant.wiring import FAMILIES, Architecture


class QuantizedForCausalLM:
    """Comes before a family's own class: a language model that the quantizer turns into what vLLM serves."""

    _keys_to_ignore_on_load_unexpected = [f"^{BINDING}$"]  # the quantizer has read it by then

    def __init__(self, config: PretrainedConfig, *arguments: Any, **options: Any) -> None:
        """Takes the arguments of the family's class.

        Raises:
            FPTQuantError: the configuration has lost its quantization.
        """
        if getattr(config, "quantization_config", None) is None:
            raise FPTQuantError(
                f"config.json: model_type is '{config.model_type}', but there is no quantization_config: "
                "fetch the checkpoint again, or quantize again"
            )
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]


class QuantizedModel:
    """Comes before a family's own class: what `AutoModel` finds, so that it can say what to use."""

    def __init__(self, config: PretrainedConfig, *arguments: Any, **options: Any) -> None:
        """Raises FPTQuantError: a checkpoint holds a whole language model, with its head."""
        raise FPTQuantError("load an fptquant checkpoint with AutoModelForCausalLM, and take its `.model`")


def _register(architecture: Architecture, part: str, first: type, auto: Any) -> None:
    """Makes the family's class of a part ours, behind `first`, and adds it to an Auto class."""
    original, config = getattr(transformers, architecture.class_of(part)), CONFIGS[architecture.model_type]
    facts = {
        "__module__": __name__,
        "__doc__": f"`{original.__name__}` of a quantized checkpoint.",
        "config_class": config,
    }
    made = type(quantized_architecture(original.__name__), (first, original), facts)
    globals()[made.__name__] = made  # where pickle looks
    auto.register(config, made, exist_ok=True)


for _architecture in FAMILIES.values():
    _register(_architecture, "ForCausalLM", QuantizedForCausalLM, AutoModelForCausalLM)
    _register(_architecture, "Model", QuantizedModel, AutoModel)
