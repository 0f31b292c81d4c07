"""The checkpoint format in transformers. Importing this module registers it; `hf_entries` does so when it is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from fptquant import hf_models as _hf_models  # noqa: F401  (registers on import)
from fptquant.architectures import architecture_of
from fptquant.checkpoint import QUANT_METHOD, CheckpointConfig
from fptquant.checkpoint.binding import BINDING, UNBOUND, Binding, Watch, bind, checksums
from fptquant.checkpoint.checks import require_consistent, require_fitting
from fptquant.errors import FPTQuantError
from fptquant.simulation.attention import ATTENTION_NAME
from fptquant.simulation.install import (
    drop_quantized_weights,
    finish_loading,
    install_simulation,
    require_shared_inputs,
)

_log = logging.getLogger(__name__)
_DTYPES = {  # safetensors' names of the types that the format uses
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


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
        self._files: list[str] = kwargs.get("checkpoint_files") or []
        stored = _stored_tensors(self._files)
        binding = Binding.of_files(self._files) if self._files else None
        if binding is not None:
            binding.require_config(model.config, config)
        require_consistent(config, model.config)
        install_simulation(model, architecture_of(model.config), config)
        drop_quantized_weights(model)
        if self._files:
            _require_tensors(model, stored)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        finish_loading(model)
        require_shared_inputs(model, architecture_of(model.config))
        if self._files:
            watch = Watch()
            for _ in watch(_read_tensors(self._files)):
                pass
            if not watch.require_bound(model.config, self.quantization_config.checkpoint):
                _log.warning(UNBOUND, self._files[0])
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors, bound again to the configuration that it writes beside them."""
        state = dict(model.state_dict())
        if self.quantization_config.checkpoint.format_version > 1:
            state[BINDING] = bind(model.config.to_diff_dict(), checksums(state))
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving again writes the same tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradients."""
        return False


def _stored_tensors(files: list[str]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of every tensor in these files, by name, from their headers.

    Raises:
        FPTQuantError: a file is truncated, or a tensor is in two of them.
    """
    stored: dict[str, tuple[torch.dtype, list[int]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    if name in stored:
                        raise FPTQuantError(f"{name} is in two of the checkpoint's files: delete the stale one")
                    part = file.get_slice(name)
                    stored[name] = (_DTYPES.get(part.get_dtype(), torch.uint8), part.get_shape())
        except (SafetensorError, OSError) as error:
            raise FPTQuantError(f"'{path}' is corrupt or truncated ({error}): fetch the checkpoint again") from None
    return stored


def _read_tensors(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                yield name, file.get_tensor(name)


def _require_tensors(model: PreTrainedModel, stored: Mapping[str, tuple[torch.dtype, list[int]]]) -> None:
    """Refuses weight files without all tensors, which transformers would replace by random values, or with other ones.

    Raises:
        FPTQuantError: the first tensor that is missing, unknown, or of another type or shape, is named.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys() - {BINDING})
    if missing:
        raise FPTQuantError(f"the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}: it is damaged")
    if unknown:
        raise FPTQuantError(
            f"the checkpoint has {len(unknown)} tensors that its config.json has no place for, the first is "
            f"{unknown[0]}: they do not belong together, fetch it again or quantize again"
        )
    for name, tensor in expected.items():
        require_fitting(name, stored[name], (tensor.dtype, tensor.shape))


# Replaces the entry of `hf_entries` in one step, which `register_quantization_config` would refuse; and comes last, so
# that a thread which sees it finds the quantizer too.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FPTQuantHfConfig
