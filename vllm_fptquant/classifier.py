"""The layer that vLLM puts on top of a language model to classify with it."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from fptquant.errors import FPTQuantError

CLASSIFIER = "score"  # vLLM's name


class ClassifierMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """In floating point, and not silently random: checkpoints in this format are of language models."""

    def create_weights(self, layer: Module, *sizes: Any, **attributes: Any) -> None:
        """Creates the weight as vLLM does, filled with NaN, so that one that was never loaded is noticed."""
        super().create_weights(layer, *sizes, **attributes)
        layer.get_parameter("weight").data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: Module) -> None:
        """Prepares the weight as vLLM does, once it is sure that it was loaded.

        Raises:
            FPTQuantError: nothing was loaded.
        """
        if bool(layer.get_parameter("weight").isnan().any()):
            raise FPTQuantError(
                f"the checkpoint is of a language model, it has no {CLASSIFIER}.weight to classify with: "
                "serve it with --convert embed, or without --runner pooling"
            )
        super().process_weights_after_loading(layer)


def require_head_rows(config: VllmConfig | None) -> None:
    """Refuses to classify by rows of a quantized lm_head (`classifier_from_token`): vLLM would need them as numbers.

    Args:
        config: of the engine that is being built; None outside of an engine.

    Raises:
        FPTQuantError: says what to do instead.
    """
    model = None if config is None else config.model_config
    if model is not None and model.convert_type == "classify" and hasattr(model.hf_config, "classifier_from_token"):
        raise FPTQuantError(
            "classifier_from_token takes rows of lm_head, which is quantized here: "
            "quantize the model with head_bits: 16 to classify with it"
        )
