"""Configuration classes of quantized checkpoints in transformers, registered with `AutoConfig` on import.

A quantized checkpoint has a `model_type` of its own: software that does not know this format refuses it, where it would
otherwise read the unquantized class into it and compute with random weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig

from fptquant.errors import FPTQuantError
from fptquant.format import MODEL_TYPE_PREFIX
from fptquant.format.binding import Binding


class FPTQuantLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """`LlamaConfig` of a quantized checkpoint."""

    model_type = f"{MODEL_TYPE_PREFIX}{LlamaConfig.model_type}"

    @classmethod
    def get_config_dict(cls, source: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `LlamaConfig.get_config_dict`; the config.json of a local directory is compared with its weights' binding.

        Raises:
            FPTQuantError: names the field that was changed; or a weight file is truncated.
        """
        content, kwargs = super().get_config_dict(source, **kwargs)
        folder = Path(source)
        if folder.is_dir() and content.get("model_type") == cls.model_type:
            binding = Binding.of_directory(folder)
            if binding is not None:
                binding.require_file(content)
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `LlamaConfig.from_dict`.

        Raises:
            FPTQuantError: a field is of a wrong type, or fields contradict each other; in one line.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:  # what validation raises differs between versions of transformers
            raise FPTQuantError(f"config.json: {' '.join(str(error).split())}") from None


AutoConfig.register(FPTQuantLlamaConfig.model_type, FPTQuantLlamaConfig, exist_ok=True)
