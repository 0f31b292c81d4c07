"""Other weights for a model that runs: what belongs to all of its layers. See also `vllm_fptquant.loading`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from fptquant.errors import FPTQuantError
from fptquant.format.binding import FREE
from vllm_fptquant.kernels.experts import ExpertStack


class ReloadGuard(Module):
    """Model whose weights vLLM may replace, as a whole or in pieces, but only by those of the same computation.

    Attributes:
        running: whether weights were prepared, so that what is loaded now replaces them.
    """

    def guard(self, vllm_config: VllmConfig) -> None:
        """Notes what is served; called once the model is built."""
        self.running = False
        self.vllm_config = vllm_config
        self._served = served_config(vllm_config.model_config)
        self._reloading = self._failed = False
        self._reloaded: set[str] = set()  # parameters

    def process_weights_after_loading(self) -> None:
        """Of vLLM's, the last when it starts a model."""
        self._require_alike()
        self.running = True

    @contextmanager
    def loading(self) -> Iterator[set[str]]:
        """Around `load_weights`: a failure leaves a model of old and new weights, which must not answer.

        Yields:
            Set that wants the names of the parameters that were loaded.

        Raises:
            FPTQuantError: an earlier one failed, or the running model computes something else.
        """
        if not self.running:
            yield set()
            return
        if self._failed:
            raise FPTQuantError("loading weights into the running model failed before: start vLLM again")
        require_same_config(self.vllm_config.model_config, self._served)
        self._reloading = self._failed = True
        loaded: set[str] = set()
        yield loaded
        if get_layerwise_info(self).can_load():  # otherwise parameters were changed where they are
            self._reloaded |= loaded
        self._failed = False

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Of the class behind this one.

        Raises:
            FPTQuantError: weights were replaced in part, because a reload failed or isn't over.
        """
        if self._reloading:
            if self._failed or any(get_layerwise_info(module).can_load() for module in self.modules()):
                raise FPTQuantError("loading weights into the running model failed or isn't over: start vLLM again")
            self._require_whole_layers()
            self._require_alike()
            self._reloading = False
            self._reloaded.clear()
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def _require_alike(self) -> None:
        """Refuses experts of different quantizers for one input, where they are computed together."""
        for module in self.modules():
            if isinstance(module, ExpertStack):
                module.require_one_quantizer()

    def _require_whole_layers(self) -> None:
        """Refuses layers of which a part was loaded: the rest is whatever was in memory."""
        for name, module in self.named_modules():
            names = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
            missing = names - self._reloaded
            if missing and missing != names:
                raise FPTQuantError(
                    f"a reload had no {', '.join(sorted(missing))}, though other tensors of {name}: start vLLM again, "
                    "and load all tensors of a layer"
                )


def served_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the computation, where vLLM takes weights from; empty if there is none."""
    fields: dict[str, Any] = get_hf_file_to_dict("config.json", config.model, config.revision) or {}
    quantization = {**fields.pop("quantization_config", {})}
    quantization.pop("producer", None)
    described = {f"quantization_config.{name}": value for name, value in quantization.items()}
    return {name: value for name, value in fields.items() if name not in FREE} | described


def require_same_config(config: ModelConfig, before: dict[str, Any]) -> None:
    """Refuses weights that were made for another computation than the one that runs.

    Args:
        config: names the checkpoint; a reload may have given it another path.
        before: `served_config` when vLLM started.

    Raises:
        FPTQuantError: names the first field that differs.
    """
    now = served_config(config)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise FPTQuantError(
                f"config.json of {config.model}: {name} is {now.get(name)!r}, but {before.get(name)!r} is what runs: "
                "start vLLM again to serve this checkpoint"
            )
