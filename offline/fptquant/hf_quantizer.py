"""The checkpoint format in transformers. Importing this module registers it; `hf_entries` does so when it is needed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from fptquant import hf_models as _hf_models  # noqa: F401  (registers on import)
from fptquant.errors import FPTQuantError
from fptquant.format import QUANT_METHOD, CheckpointConfig
from fptquant.format.binding import BINDING, UNBOUND, Binding, Watch, bind, checksums
from fptquant.format.checks import require_consistent, require_fitting
from fptquant.simulate.attention import ATTENTION_NAME
from fptquant.simulate.install import (
    drop_quantized_weights,
    finish_loading,
    install_simulation,
    require_shared_inputs,
)
from fptquant.weight_files import DTYPES, WeightFiles
from fptquant.wiring.lookup import architecture_of, require_range

_log = logging.getLogger(__name__)


class FPTQuantHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` as transformers passes it around; `checkpoint` is the validated form."""

    def __init__(self, **fields: Any) -> None:
        """Validates the fields of `quantization_config`."""
        self.quant_method = QUANT_METHOD
        self.checkpoint = CheckpointConfig.parse({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json has as `quantization_config`."""
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
        files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        self._weights = WeightFiles.of_files(Path(model.config.name_or_path), files)
        binding = Binding.of_files(files)
        if binding is not None:
            binding.require_config(model.config, config)
        architecture = architecture_of(model.config)
        require_consistent(config, model.config, architecture.shape(model.config).widths)
        require_range(architecture, model.dtype, "load it with dtype=torch.bfloat16")
        install_simulation(model, architecture, config)
        drop_quantized_weights(model)
        if files:
            require_tensors(model, self._weights)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        finish_loading(model)
        require_shared_inputs(model, architecture_of(model.config))
        if self._weights.tensors:
            watch = Watch()
            for _ in watch(self._weights.items()):
                pass
            if not watch.require_bound(model.config, self.quantization_config.checkpoint):
                _log.warning(UNBOUND, self._weights.directory)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors, bound again to the configuration that it writes beside them."""
        state = _stored_state(model)
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


def _stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """By name, the tensors that a checkpoint of a model holds: all but a tied head."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def require_tensors(model: PreTrainedModel, weights: WeightFiles) -> None:
    """Refuses weight files without all tensors, which transformers would replace by random values, or with other ones.

    Raises:
        FPTQuantError: the first tensor that is missing, unknown, or of another type or shape, is named.
    """
    expected, stored = _stored_state(model), weights.tensors
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys() - {BINDING})
    if missing:
        raise FPTQuantError(f"the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}: it is damaged")
    if unknown:
        raise FPTQuantError(
            f"the checkpoint has {len(unknown)} tensors that its config.json has no place for, the first is "
            f"{unknown[0]}: they do not belong together, fetch it again or quantize again"
        )
    for name, tensor in expected.items():
        found = stored[name]
        require_fitting(name, (DTYPES.get(found.dtype, found.dtype), found.shape), (tensor.dtype, tensor.shape))


# Replaces the entry of `hf_entries` in one step, which `register_quantization_config` would refuse; and comes last, so
# that a thread which sees it finds the quantizer too.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FPTQuantHfConfig
