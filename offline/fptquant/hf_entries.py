"""What transformers' tables hold until the first checkpoint of ours is opened: entries that import the rest then.

The tables are needed in the middle of transformers' own imports, when `fptquant.hf_quantizer`, which builds on models,
can't be imported yet, and by many programs that never see a checkpoint of ours, which shouldn't pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from fptquant.wiring import FAMILIES

QUANT_METHOD = "fptquant"  # as in `fptquant.format`, which imports torch
MODEL_TYPES = tuple(f"{QUANT_METHOD}_{model_type}" for model_type in FAMILIES)


def add_model_types() -> None:
    """Adds the model types of our checkpoints to `AutoConfig`'s table."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    for model_type in MODEL_TYPES:
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, _config_entry(model_type, CONFIG_MAPPING))


def add_quantization_method() -> None:
    """Adds `quant_method: fptquant` to the table of quantization configs."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class QuantizationEntry(QuantizationConfigMixin):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return _loaded(QUANT_METHOD, AUTO_QUANTIZATION_CONFIG_MAPPING, cls).from_dict(*args, **kwargs)

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantizationEntry)


def _config_entry(name: str, table: Mapping[str, Any]) -> type:
    class ConfigEntry(PretrainedConfig):  # type: ignore[misc]
        model_type = name

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _loaded(name, table, cls)(*args, **kwargs)

        @classmethod
        def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return _loaded(name, table, cls).get_config_dict(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return _loaded(name, table, cls).from_dict(*args, **kwargs)

    return ConfigEntry


def _loaded(name: str, table: Mapping[str, Any], entry: type) -> Any:
    """The class that `fptquant.hf_quantizer` puts in the place of `entry`.

    Raises:
        ImportError: that module can't be imported, or transformers was reloaded after it was.
    """
    try:
        import_module("fptquant.hf_quantizer")
    except Exception as error:
        raise ImportError(
            f"the checkpoint needs fptquant, which can't be imported ({error}): install vllm-fptquant again"
        ) from error
    found = table[name]
    if found is entry:
        raise ImportError(
            f"fptquant.hf_quantizer knows no '{name}', or transformers was reloaded since: restart Python, and upgrade "
            "vllm-fptquant if that does not help"
        )
    return found
