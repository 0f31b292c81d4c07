"""The quantized lm_head: the linear method, on a layer that loads its weights as vLLM's embeddings do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_fptquant.linear import FPTQuantLinearMethod
from vllm_fptquant.loading import is_consumed


class FPTQuantHeadMethod(FPTQuantLinearMethod):
    """One instance per lm_head. vLLM pads the vocabulary; padded rows have codes 0."""

    def create_weights(
        self,
        layer: ParallelLMHead,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Creates the head's parameters as those of a linear layer, loaded by rows of the vocabulary."""
        rows = extra_weight_attrs.pop("weight_loader").__func__

        def load(layer: ParallelLMHead, param: Any, loaded: Tensor) -> None:
            if getattr(param, "output_dim", None) is None:
                param.data.copy_(loaded.reshape(param.shape))  # one value for the whole layer
            else:
                rows(layer, param, loaded)

        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=MethodType(load, layer),
        )

    def _require_rows(self, layer: ParallelLMHead, index: int, rows: int) -> None:
        """The vocabulary's, which the layer's own loader has checked."""

    def process_weights_after_loading(self, layer: ParallelLMHead) -> None:
        """Gives the padded rows a scale, then as `FPTQuantLinearMethod.process_weights_after_loading`."""
        if layer.weight_scale.is_meta:
            return  # pooling runners have no head, but vLLM calls this all the same
        if not is_consumed(layer, "weight_scale"):
            layer.weight_scale.data[layer.num_org_embeddings_per_partition :] = 1.0
            bits = self.scheme.weights.bits
            zero = sum(1 << (bits * i + bits - 1) for i in range(32 // bits))  # codes 0 in offset binary
            if self.scheme.weights.group_size is not None:
                layer.weight_multiplier.data[layer.num_org_embeddings_per_partition :] = 1
            padding = layer.weight_packed.data[layer.num_org_embeddings_per_partition :]
            padding.fill_(zero - (1 << 32) if zero >= 1 << 31 else zero)
        super().process_weights_after_loading(layer)
