"""The checkpoint format in transformers. Importing this module registers it; `hf_entries` does so when it is needed."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from fptquant.architectures import architecture_of
from fptquant.checkpoint import QUANT_METHOD, CheckpointConfig
from fptquant.errors import FPTQuantError
from fptquant.simulation.attention import ATTENTION_NAME
from fptquant.simulation.install import drop_quantized_weights, finish_loading, install_simulation


class FPTQuantHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` as transformers passes it around; `checkpoint` is the validated form."""

    def __init__(self, **fields: Any) -> None:
        """Validates the fields of `quantization_config`."""
        self.quant_method = QUANT_METHOD
        self.checkpoint = CheckpointConfig.parse({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        """The format's own fields."""
        return self.checkpoint.to_dict()


@register_quantizer(QUANT_METHOD)
class FPTQuantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a checkpoint as the exact simulation of what vLLM serves."""

    requires_calibration = True
    quantization_config: FPTQuantHfConfig

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """A quantized KV cache needs our attention function, whatever was asked for."""
        if self.quantization_config.checkpoint.kv_cache.bits < 16:
            config._attn_implementation = ATTENTION_NAME
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config.checkpoint
        install_simulation(model, architecture_of(model.config), config)
        drop_quantized_weights(model)
        _require_tensors(model, kwargs.get("checkpoint_files") or [])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        finish_loading(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving again writes the same tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradients."""
        return False


def _require_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Refuses weight files without all scales and codes, which transformers would replace by what memory holds.

    Raises:
        FPTQuantError: a tensor of a quantized layer is missing; the first is named.
    """
    stored: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    expected = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    missing = sorted(expected - stored)
    if files and missing:
        raise FPTQuantError(f"the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}: it is damaged")


# Replaces the entry of `hf_entries` in one step, which `register_quantization_config` would refuse; and comes last, so
# that a thread which sees it finds the quantizer too.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FPTQuantHfConfig
