"""Configuration classes of quantized checkpoints in transformers, registered with `AutoConfig` on import.

A quantized checkpoint has a `model_type` of its own: software that does not know this format refuses it, where it would
otherwise read the unquantized class into it and compute with random weights. Each family has a class in this module,
FPTQuantLlamaConfig for Llama.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from fptquant.errors import FPTQuantError
from fptquant.format import MODEL_TYPE_PREFIX, quantized_architecture
from fptquant.format.binding import Binding
from fptquant.wiring import FAMILIES, Architecture


class QuantizedConfig:
    """What comes before a family's own class to make it the configuration of a quantized checkpoint."""

    model_type: str

    @classmethod
    def get_config_dict(cls, source: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Reads config.json as the family's class does; a local directory's is compared with its weights' binding.

        Raises:
            FPTQuantError: names the field that was changed; or a weight file is truncated.
        """
        content, kwargs = super().get_config_dict(source, **kwargs)  # type: ignore[misc]
        folder = Path(source)
        if folder.is_dir() and content.get("model_type") == cls.model_type:
            binding = Binding.of_directory(folder)
            if binding is not None:
                binding.require_file(content)
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration as the family's class does, and says in one line what is wrong with it.

        Raises:
            FPTQuantError: a field is of a wrong type, or fields contradict each other; in one line.
        """
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except Exception as error:  # what validation raises differs between versions of transformers
            raise FPTQuantError(f"config.json: {' '.join(str(error).split())}") from None


def _config_class(architecture: Architecture) -> Any:
    """The family's class of configurations, made ours."""
    original = getattr(transformers, architecture.class_of("Config"))
    name = quantized_architecture(original.__name__)
    facts = {
        "__module__": __name__,
        "__doc__": f"`{original.__name__}` of a quantized checkpoint.",
        "model_type": f"{MODEL_TYPE_PREFIX}{architecture.model_type}",
    }
    return type(name, (QuantizedConfig, original), facts)


CONFIGS = {model_type: _config_class(architecture) for model_type, architecture in FAMILIES.items()}
for _class in CONFIGS.values():
    globals()[_class.__name__] = _class  # where pickle looks
    AutoConfig.register(_class.model_type, _class, exist_ok=True)
